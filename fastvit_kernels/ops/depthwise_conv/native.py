"""The bridge to the C++ kernels of depthwise_conv."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastvit_kernels.ops.depthwise_conv.reference import Static
from fastvit_kernels.ops.native import cpu_reasons
from fastvit_kernels.ops.operator import GradientKernels, Outputs, Tensors

# What the C++ kernels of gradients and statistics take; they hold a row of the padded map.
MOST_PADDING = 64


class Cpu(GradientKernels):
    """C++ for the CPU: taps are read where the map lies, normalised pixels from the cache."""

    name = "cpu"
    backward = "depthwise_conv_backward", "native"

    def supports(self, tensors: Tensors, static: Static) -> list[str]:
        return cpu_reasons(tensors, static.dtype)

    def adds_own(self, tensors: Tensors, static: Static) -> bool:
        return True

    def run(self, tensors: Tensors, packed: Tensor | None, static: Static) -> Outputs:
        return (torch.ops.fastvit.depthwise_conv.default(tensors, packed, *static),)

    def supports_backward(
        self, grads: Sequence[Tensor], tensors: Tensors, needs: Sequence[bool], static: Static
    ) -> list[str]:
        if static.padding > MOST_PADDING:
            return [f"padding {static.padding}: the kernels of the gradients take at most {MOST_PADDING}"]
        return []
