"""The bridge to the Triton kernels of head_tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastvit_kernels.ops.head_tokens.reference import Static
from fastvit_kernels.ops.operator import GradientKernels, Outputs, Tensors
from fastvit_kernels.ops.triton_support import norm_gradient_reasons, reasons


class Triton(GradientKernels):
    """Normalised rows and their sums in one launch; the linear; its pieces' norm and activation in a third."""

    name = "triton"
    backward = "head_tokens_backward", "triton"

    def supports(self, tensors: Tensors, static: Static) -> list[str]:
        x = tensors[0]
        assert x is not None
        # The sums take whole rows.
        return reasons(tensors, static.dtype) + norm_gradient_reasons(x.shape[-1])

    def run(self, tensors: Tensors, packed: Tensor | None, static: Static) -> Outputs:
        return (torch.ops.fastvit.head_tokens.triton(tensors, *static),)


def launch(tensors: Tensors, static: Static) -> Outputs:
    """The operator's outputs, from dense or strided tensors on one device."""
    # Triton may be missing or slow to import: only a launch needs it.
    from fastvit_kernels.ops.head_tokens import triton_kernels

    return triton_kernels.run(tensors, static)


def launch_backward(grads: Sequence[Tensor], tensors: Tensors, needs: Sequence[bool], static: Static) -> list[Tensor]:
    """The gradients of the needed tensors, in order."""
    from fastvit_kernels.ops.head_tokens import triton_backward

    return triton_backward.run(grads, tensors, needs, static)
