"""The bridge to the C++ kernels of pointwise_mlp."""

from __future__ import annotations

import torch
from torch import Tensor

from fastvit_kernels.ops.native import cpu_reasons
from fastvit_kernels.ops.operator import GradientKernels, Outputs, Tensors
from fastvit_kernels.ops.pointwise_mlp.reference import Static


class Cpu(GradientKernels):
    """C++ for the CPU: the hidden rows of a tile live in the cache only."""

    name = "cpu"
    backward = "pointwise_mlp_backward", "native"

    def supports(self, tensors: Tensors, static: Static) -> list[str]:
        return cpu_reasons(tensors, static.dtype)

    def adds_own(self, tensors: Tensors, static: Static) -> bool:
        return True

    def run(self, tensors: Tensors, packed: Tensor | None, static: Static) -> Outputs:
        return (torch.ops.fastvit.pointwise_mlp.default(tensors, packed, *static),)
