"""The bridge to the Triton kernels of depthwise_mlp."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastvit_kernels.ops.depthwise_mlp.reference import Static
from fastvit_kernels.ops.operator import GradientKernels, Outputs, Tensors
from fastvit_kernels.ops.triton_support import norm_gradient_reasons, reasons


class Triton(GradientKernels):
    """Norm and first linear in one launch; convolution, second linear and residual in another."""

    name = "triton"
    backward = "depthwise_mlp_backward", "triton"

    def supports(self, tensors: Tensors, static: Static) -> list[str]:
        return reasons(tensors, static.dtype)

    def run(self, tensors: Tensors, packed: Tensor | None, static: Static) -> Outputs:
        return tuple(torch.ops.fastvit.depthwise_mlp.triton(tensors, *static))

    def supports_backward(
        self, grads: Sequence[Tensor], tensors: Tensors, needs: Sequence[bool], static: Static
    ) -> list[str]:
        x = tensors[0]
        assert x is not None
        return norm_gradient_reasons(x.shape[-1]) if static.norm == "layer" else []


def launch(tensors: Tensors, static: Static) -> Outputs:
    """The operator's outputs, from dense or strided tensors on one device."""
    # Triton may be missing or slow to import: only a launch needs it.
    from fastvit_kernels.ops.depthwise_mlp import triton_kernels

    return triton_kernels.run(tensors, static)


def launch_backward(grads: Sequence[Tensor], tensors: Tensors, needs: Sequence[bool], static: Static) -> list[Tensor]:
    """The gradients of the needed tensors, in order."""
    from fastvit_kernels.ops.depthwise_mlp import triton_backward

    return triton_backward.run(grads, tensors, needs, static)


def launch_statistics(tensors: Tensors, static: Static) -> Tensor:
    """Means and biased variances `[2, 2 * C_hidden + C_out]` of what the batch norms take."""
    from fastvit_kernels.ops.depthwise_mlp import triton_statistics

    return triton_statistics.run(tensors, static)
