"""The bridge to the C++ kernels of merge_head_tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from fastvit_kernels.ops.merge_head_tokens.reference import Static
from fastvit_kernels.ops.native import cpu_reasons
from fastvit_kernels.ops.operator import Outputs, Tensors


class Cpu:
    """C++ for the CPU: one pass over the rows. Gradients are copies and a mean, which PyTorch makes as fast."""

    name = "cpu"

    def supports(self, tensors: Tensors, static: Static) -> list[str]:
        return cpu_reasons(tensors, static.dtype)

    def run(self, tensors: Tensors, packed: Tensor | None, static: Static) -> Outputs:
        return (torch.ops.fastvit.merge_head_tokens.default(tensors, packed, *static),)
