"""The bridge to the C++ kernels of global_attention."""

from __future__ import annotations

import torch
from torch import Tensor

from fastvit_kernels.ops.global_attention.reference import Static
from fastvit_kernels.ops.native import cpu_reasons
from fastvit_kernels.ops.operator import GradientKernels, Outputs, Tensors


class Cpu(GradientKernels):
    """C++ for the CPU: scores never leave the cache; output projection and residual ride on the same tile."""

    name = "cpu"
    backward = "global_attention_backward", "native"

    def supports(self, tensors: Tensors, static: Static) -> list[str]:
        return cpu_reasons(tensors, static.dtype)

    def reads_outputs(self, static: Static) -> bool:
        return static.return_statistics

    def adds_own(self, tensors: Tensors, static: Static) -> bool:
        # Something must be between x and the attention, which writes the queries' gradient itself.
        return static.norm != "none" or tensors[7] is not None or static.add_query_input

    def run(self, tensors: Tensors, packed: Tensor | None, static: Static) -> Outputs:
        return tuple(torch.ops.fastvit.global_attention.default(tensors, packed, *static))
