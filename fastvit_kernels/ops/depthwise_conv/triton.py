"""The bridge to the Triton kernels of depthwise_conv."""

from __future__ import annotations

import torch
from torch import Tensor

from fastvit_kernels.ops.depthwise_conv.reference import Static
from fastvit_kernels.ops.operator import Outputs, Tensors
from fastvit_kernels.ops.triton_support import reasons


class Triton:
    """One pass over the map, behind one that normalises its pixels where there is a LayerNorm."""

    name = "triton"

    def supports(self, tensors: Tensors, static: Static) -> list[str]:
        return reasons(tensors, static.dtype)

    def run(self, tensors: Tensors, packed: Tensor | None, static: Static) -> Outputs:
        return (torch.ops.fastvit.depthwise_conv.triton(tensors, *static),)


def launch(tensors: Tensors, static: Static) -> Outputs:
    """The operator's outputs, from dense or strided tensors on one device."""
    # Triton may be missing or slow to import: only a launch needs it.
    from fastvit_kernels.ops.depthwise_conv import triton_kernels

    return triton_kernels.run(tensors, static)
