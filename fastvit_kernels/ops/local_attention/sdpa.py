"""local_attention around PyTorch's own attention of heads."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastvit_kernels.ops.attention import sdpa_attend, sdpa_gradient_reasons, sdpa_reasons
from fastvit_kernels.ops.local_attention.reference import Static, around
from fastvit_kernels.ops.operator import GradientKernels, Outputs, Tensors


class Sdpa(GradientKernels):
    """The reference's steps with PyTorch's attention among them; gradients by recomputing the same."""

    name = "sdpa"
    backward = "local_attention_backward", "sdpa"

    def supports(self, tensors: Tensors, static: Static) -> list[str]:
        return sdpa_reasons(tensors)

    def run(self, tensors: Tensors, packed: Tensor | None, static: Static) -> Outputs:
        return tuple(torch.ops.fastvit.local_attention.sdpa(tensors, *static))

    def supports_backward(
        self, grads: Sequence[Tensor], tensors: Tensors, needs: Sequence[bool], static: Static
    ) -> list[str]:
        return sdpa_gradient_reasons(tensors, static.dtype)


def compose(tensors: Tensors, static: Static) -> Outputs:
    """The operator in PyTorch's operators, differentiable once."""
    return around(sdpa_attend, tensors, static)
