"""The bridge to the C++ kernels of head_tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastvit_kernels.ops.head_tokens.reference import Static
from fastvit_kernels.ops.native import cpu_reasons
from fastvit_kernels.ops.operator import Outputs, Tensors


class Cpu:
    """C++ for the CPU: blocks of rows with their sums first, then the head tokens of each image."""

    name = "cpu"

    def supports(self, tensors: Tensors, static: Static) -> list[str]:
        return cpu_reasons(tensors, static.dtype)

    def run(self, tensors: Tensors, packed: Tensor | None, static: Static) -> Outputs:
        return (torch.ops.fastvit.head_tokens.default(tensors, packed, *static),)

    def supports_backward(
        self, grads: Sequence[Tensor], tensors: Tensors, needs: Sequence[bool], static: Static
    ) -> list[str]:
        return []

    def run_backward(
        self, grads: Sequence[Tensor], tensors: Tensors, needs: Sequence[bool], static: Static
    ) -> list[Tensor]:
        return list(torch.ops.fastvit.head_tokens_backward.native(grads, tensors, needs, *static))
