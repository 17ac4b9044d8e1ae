"""The bridge to the Triton kernels of pooled_projection."""

from __future__ import annotations

import torch
from torch import Tensor

from fastvit_kernels.ops.operator import Outputs, Tensors
from fastvit_kernels.ops.pooled_projection.reference import Static
from fastvit_kernels.ops.triton_support import reasons


class Triton:
    """Squares are averaged and normalised on the way out; their statistics and the linear are launches of their own."""

    name = "triton"

    def supports(self, tensors: Tensors, static: Static) -> list[str]:
        return reasons(tensors, static.dtype)

    def run(self, tensors: Tensors, packed: Tensor | None, static: Static) -> Outputs:
        return (torch.ops.fastvit.pooled_projection.triton(tensors, *static),)


def launch(tensors: Tensors, static: Static) -> Outputs:
    """The operator's outputs, from dense tensors on one device."""
    # Triton may be missing or slow to import: only a launch needs it.
    from fastvit_kernels.ops.pooled_projection import triton_kernels

    return triton_kernels.run(tensors, static)
