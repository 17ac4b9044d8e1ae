"""Triton kernels of global_attention and their launcher."""

from __future__ import annotations

from fastvit_kernels.ops.global_attention.reference import Static
from fastvit_kernels.ops.operator import Outputs, Tensors


class Triton:
    """PLACEHOLDER"""

    name = "triton"

    def supports(self, tensors: Tensors, static: Static) -> list[str]:
        return ["not there yet"]


def launch(tensors: Tensors, static: Static) -> Outputs:
    raise NotImplementedError
