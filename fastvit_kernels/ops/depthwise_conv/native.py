"""The bridge to the C++ kernels of depthwise_conv."""

from __future__ import annotations

import torch
from torch import Tensor

from fastvit_kernels.ops.depthwise_conv.reference import Static
from fastvit_kernels.ops.native import cpu_reasons
from fastvit_kernels.ops.operator import Outputs, Tensors


class Cpu:
    """C++ for the CPU: taps are read where the map lies, normalised pixels from the cache."""

    name = "cpu"

    def supports(self, tensors: Tensors, static: Static) -> list[str]:
        return cpu_reasons(tensors, static.dtype)

    def run(self, tensors: Tensors, packed: Tensor | None, static: Static) -> Outputs:
        return (torch.ops.fastvit.depthwise_conv.default(tensors, packed, *static),)
