"""The bridge to the C++ kernels of local_attention."""

from __future__ import annotations

import torch
from torch import Tensor

from fastvit_kernels.ops.local_attention.reference import Static
from fastvit_kernels.ops.native import cpu_reasons
from fastvit_kernels.ops.operator import Outputs, Tensors


class Cpu:
    """C++ for the CPU: windows are gathered, projected, attended and put back by one task each, in the cache."""

    name = "cpu"

    def supports(self, tensors: Tensors, static: Static) -> list[str]:
        return cpu_reasons(tensors, static.dtype)

    def run(self, tensors: Tensors, packed: Tensor | None, static: Static) -> Outputs:
        return tuple(torch.ops.fastvit.local_attention.default(tensors, packed, *static))
