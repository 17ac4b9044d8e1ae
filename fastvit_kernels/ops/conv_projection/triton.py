"""The bridge to the Triton kernels of conv_projection."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastvit_kernels.ops.conv_projection.reference import Static
from fastvit_kernels.ops.operator import GradientKernels, Outputs, Tensors
from fastvit_kernels.ops.triton_support import norm_gradient_reasons, reasons


class Triton(GradientKernels):
    """Depthwise convolutions gathered on the way into the tensor cores, all three branches in one launch."""

    name = "triton"
    backward = "conv_projection_backward", "triton"

    def supports(self, tensors: Tensors, static: Static) -> list[str]:
        return reasons(tensors, static.dtype)

    def run(self, tensors: Tensors, packed: Tensor | None, static: Static) -> Outputs:
        return tuple(torch.ops.fastvit.conv_projection.triton(tensors, *static))

    def supports_backward(
        self, grads: Sequence[Tensor], tensors: Tensors, needs: Sequence[bool], static: Static
    ) -> list[str]:
        x = tensors[0]
        assert x is not None
        return norm_gradient_reasons(x.shape[-1]) if static.norm_eps is not None else []


def launch(tensors: Tensors, static: Static) -> Outputs:
    """The operator's outputs, from dense or strided tensors on one device."""
    # Triton may be missing or slow to import: only a launch needs it.
    from fastvit_kernels.ops.conv_projection import triton_kernels

    return triton_kernels.run(tensors, static)


def launch_backward(grads: Sequence[Tensor], tensors: Tensors, needs: Sequence[bool], static: Static) -> list[Tensor]:
    """The gradients of the needed tensors, in order."""
    from fastvit_kernels.ops.conv_projection import triton_backward

    return triton_backward.run(grads, tensors, needs, static)


def launch_statistics(tensors: Tensors, static: Static) -> Tensor:
    """Mean and biased variance `[3, 2, C]` of the three depthwise outputs."""
    from fastvit_kernels.ops.conv_projection import triton_kernels

    return triton_kernels.statistics(tensors, static)
