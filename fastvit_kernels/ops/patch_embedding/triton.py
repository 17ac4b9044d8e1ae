"""The bridge to the Triton kernels of patch_embedding."""

from __future__ import annotations

import torch
from torch import Tensor

from fastvit_kernels.ops.operator import Outputs, Tensors
from fastvit_kernels.ops.patch_embedding.reference import Static
from fastvit_kernels.ops.triton_support import reasons


class Triton:
    """A product whose rows are gathered from the map, channels first or last; the LayerNorm runs on finished rows."""

    name = "triton"

    def supports(self, tensors: Tensors, static: Static) -> list[str]:
        return reasons(tensors, static.dtype)

    def run(self, tensors: Tensors, packed: Tensor | None, static: Static) -> Outputs:
        return (torch.ops.fastvit.patch_embedding.triton(tensors, *static),)


def launch(tensors: Tensors, static: Static) -> Outputs:
    """The operator's outputs, from dense or strided tensors on one device."""
    # Triton may be missing or slow to import: only a launch needs it.
    from fastvit_kernels.ops.patch_embedding import triton_kernels

    return triton_kernels.run(tensors, static)
