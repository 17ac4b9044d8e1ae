"""The bridge to the C++ kernels of batch_norm_act."""

from __future__ import annotations

import torch
from torch import Tensor

from fastvit_kernels.ops.batch_norm_act.reference import Static
from fastvit_kernels.ops.native import cpu_reasons
from fastvit_kernels.ops.operator import GradientKernels, Outputs, Tensors


class Cpu(GradientKernels):
    """C++ for the CPU: a pass over the rows for the statistics, one for the result; two for the gradients."""

    name = "cpu"
    backward = "batch_norm_act_backward", "native"

    def supports(self, tensors: Tensors, static: Static) -> list[str]:
        return cpu_reasons(tensors, static.dtype)

    def run(self, tensors: Tensors, packed: Tensor | None, static: Static) -> Outputs:
        return (torch.ops.fastvit.batch_norm_act.default(tensors, packed, *static),)
