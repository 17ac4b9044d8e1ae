"""The bridge to the C++ kernels of depthwise_mlp."""

from __future__ import annotations

import torch
from torch import Tensor

from fastvit_kernels.ops.depthwise_mlp.reference import Static
from fastvit_kernels.ops.native import cpu_reasons
from fastvit_kernels.ops.operator import Outputs, Tensors


class Cpu:
    """C++ for the CPU: bands of the map walk the hidden channels in chunks, which stay in the cache."""

    name = "cpu"

    def supports(self, tensors: Tensors, static: Static) -> list[str]:
        reasons = cpu_reasons(tensors, static.dtype)
        if tensors[14] is not None and static.inner_residual == "after_activation" and static.bn_after_activation:
            reasons.append("bn2 stands between the activation and the inner residual")
        return reasons

    def run(self, tensors: Tensors, packed: Tensor | None, static: Static) -> Outputs:
        return tuple(torch.ops.fastvit.depthwise_mlp.default(tensors, packed, *static))
