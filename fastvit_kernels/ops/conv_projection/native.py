"""The bridge to the C++ kernels of conv_projection."""

from __future__ import annotations

import torch
from torch import Tensor

from fastvit_kernels.ops.conv_projection.reference import Static
from fastvit_kernels.ops.native import cpu_reasons
from fastvit_kernels.ops.operator import Outputs, Tensors

# What the C++ kernels take; they hold a row of the padded map.
_MOST_PADDING = 64


class Cpu:
    """C++ for the CPU: LayerNorm, the three depthwise convolutions, BN and the three linears in one pass over x."""

    name = "cpu"

    def supports(self, tensors: Tensors, static: Static) -> list[str]:
        reasons = cpu_reasons(tensors, static.dtype)
        if max(static.padding) > _MOST_PADDING:
            reasons.append(f"padding {max(static.padding)}: the CPU kernels take at most {_MOST_PADDING}")
        return reasons

    def run(self, tensors: Tensors, packed: Tensor | None, static: Static) -> Outputs:
        return tuple(torch.ops.fastvit.conv_projection.default(tensors, packed, *static))
