"""The bridge to the C++ kernels of pooled_projection."""

from __future__ import annotations

import torch
from torch import Tensor

from fastvit_kernels.ops.native import cpu_reasons
from fastvit_kernels.ops.operator import GradientKernels, Outputs, Tensors
from fastvit_kernels.ops.pooled_projection.reference import Static


class Cpu(GradientKernels):
    """C++ for the CPU: pooled pixels first, then blocks of their rows times panels of the weight."""

    name = "cpu"
    backward = "pooled_projection_backward", "native"

    def supports(self, tensors: Tensors, static: Static) -> list[str]:
        return cpu_reasons(tensors, static.dtype)

    def run(self, tensors: Tensors, packed: Tensor | None, static: Static) -> Outputs:
        return (torch.ops.fastvit.pooled_projection.default(tensors, packed, *static),)
