"""The bridge to the Triton kernels of merge_head_tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastvit_kernels.ops.merge_head_tokens.reference import Static
from fastvit_kernels.ops.operator import GradientKernels, Outputs, Tensors
from fastvit_kernels.ops.triton_support import reasons


class Triton(GradientKernels):
    """One pass over the rows, forward and backward."""

    name = "triton"
    backward = "merge_head_tokens_backward", "triton"

    def supports(self, tensors: Tensors, static: Static) -> list[str]:
        return reasons(tensors, static.dtype)

    def run(self, tensors: Tensors, packed: Tensor | None, static: Static) -> Outputs:
        return (torch.ops.fastvit.merge_head_tokens.triton(tensors, *static),)


def launch(tensors: Tensors, static: Static) -> Outputs:
    """The operator's outputs, from dense or strided tensors on one device."""
    # Triton may be missing or slow to import: only a launch needs it.
    from fastvit_kernels.ops.merge_head_tokens import triton_kernels

    return triton_kernels.run(tensors, static)


def launch_backward(grads: Sequence[Tensor], tensors: Tensors, needs: Sequence[bool], static: Static) -> list[Tensor]:
    """The gradients of the needed tensors, in order."""
    from fastvit_kernels.ops.merge_head_tokens import triton_kernels

    return triton_kernels.run_backward(grads, tensors, needs, static)
