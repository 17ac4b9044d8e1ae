"""The bridge to the C++ kernels of head_tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from fastvit_kernels.ops.head_tokens.reference import Static
from fastvit_kernels.ops.native import cpu_reasons
from fastvit_kernels.ops.operator import GradientKernels, Outputs, Tensors


class Cpu(GradientKernels):
    """C++ for the CPU: blocks of rows with their sums first, then the head tokens of each image."""

    name = "cpu"
    backward = "head_tokens_backward", "native"

    def supports(self, tensors: Tensors, static: Static) -> list[str]:
        return cpu_reasons(tensors, static.dtype)

    def run(self, tensors: Tensors, packed: Tensor | None, static: Static) -> Outputs:
        return (torch.ops.fastvit.head_tokens.default(tensors, packed, *static),)
