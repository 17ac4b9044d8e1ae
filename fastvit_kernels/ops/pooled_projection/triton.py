"""The bridge to the Triton kernels of pooled_projection."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastvit_kernels.ops.operator import GradientKernels, Outputs, Tensors
from fastvit_kernels.ops.pooled_projection.reference import Static
from fastvit_kernels.ops.triton_support import reasons


class Triton(GradientKernels):
    """Squares are averaged and normalised on the way out; their statistics and the linear are launches of their own."""

    name = "triton"
    backward = "pooled_projection_backward", "triton"

    def supports(self, tensors: Tensors, static: Static) -> list[str]:
        return reasons(tensors, static.dtype)

    def run(self, tensors: Tensors, packed: Tensor | None, static: Static) -> Outputs:
        return (torch.ops.fastvit.pooled_projection.triton(tensors, *static),)


def launch(tensors: Tensors, static: Static) -> Outputs:
    """The operator's outputs, from dense tensors on one device."""
    # Triton may be missing or slow to import: only a launch needs it.
    from fastvit_kernels.ops.pooled_projection import triton_kernels

    return triton_kernels.run(tensors, static)


def launch_backward(grads: Sequence[Tensor], tensors: Tensors, needs: Sequence[bool], static: Static) -> list[Tensor]:
    """The gradients of the needed tensors, in order."""
    from fastvit_kernels.ops.pooled_projection import triton_backward

    return triton_backward.run(grads, tensors, needs, static)
