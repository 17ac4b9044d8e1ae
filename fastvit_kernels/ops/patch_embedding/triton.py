"""The bridge to the Triton kernels of patch_embedding."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastvit_kernels.ops.operator import GradientKernels, Outputs, Tensors
from fastvit_kernels.ops.patch_embedding.reference import Static, has_bare_scales
from fastvit_kernels.ops.triton_support import norm_gradient_reasons, reasons


class Triton(GradientKernels):
    """A product whose rows are gathered from the map, channels first or last; the LayerNorm runs on finished rows."""

    name = "triton"
    backward = "patch_embedding_backward", "triton"

    def supports(self, tensors: Tensors, static: Static) -> list[str]:
        return reasons(tensors, static.dtype)

    def run(self, tensors: Tensors, packed: Tensor | None, static: Static) -> Outputs:
        return (torch.ops.fastvit.patch_embedding.triton(tensors, *static),)

    def supports_backward(
        self, grads: Sequence[Tensor], tensors: Tensors, needs: Sequence[bool], static: Static
    ) -> list[str]:
        x, weight = tensors[:2]
        assert x is not None and weight is not None
        if has_bare_scales(tensors, static):
            return ["a scale and shift without a norm"]
        found = norm_gradient_reasons(weight.shape[0]) if static.norm_eps is not None else []
        return found + (norm_gradient_reasons(x.shape[-1]) if static.in_norm_eps is not None else [])


def launch(tensors: Tensors, static: Static) -> Outputs:
    """The operator's outputs, from dense or strided tensors on one device."""
    # Triton may be missing or slow to import: only a launch needs it.
    from fastvit_kernels.ops.patch_embedding import triton_kernels

    return triton_kernels.run(tensors, static)


def launch_backward(grads: Sequence[Tensor], tensors: Tensors, needs: Sequence[bool], static: Static) -> list[Tensor]:
    """The gradients of the needed tensors, in order."""
    from fastvit_kernels.ops.patch_embedding import triton_backward

    return triton_backward.run(grads, tensors, needs, static)


def launch_statistics(tensors: Tensors, static: Static) -> Tensor:
    """Mean and biased variance `[2, C_out]` of what the batch norm takes."""
    from fastvit_kernels.ops.patch_embedding import triton_kernels

    return triton_kernels.statistics(tensors, static)
