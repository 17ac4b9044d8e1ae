"""The bridge to the C++ kernels of patch_embedding."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastvit_kernels.ops.native import cpu_reasons
from fastvit_kernels.ops.operator import Outputs, Tensors
from fastvit_kernels.ops.patch_embedding.reference import Static


class Cpu:
    """C++ for the CPU: each pixel's neighbourhood is gathered in the cache; the LayerNorm runs on finished rows."""

    name = "cpu"

    def supports(self, tensors: Tensors, static: Static) -> list[str]:
        return cpu_reasons(tensors, static.dtype)

    def run(self, tensors: Tensors, packed: Tensor | None, static: Static) -> Outputs:
        return (torch.ops.fastvit.patch_embedding.default(tensors, packed, *static),)

    def supports_backward(
        self, grads: Sequence[Tensor], tensors: Tensors, needs: Sequence[bool], static: Static
    ) -> list[str]:
        step = static.activation != "none" or tensors[9] is not None
        return ["a batch norm or an activation behind the convolution"] if step else []

    def run_backward(
        self, grads: Sequence[Tensor], tensors: Tensors, needs: Sequence[bool], static: Static
    ) -> list[Tensor]:
        return list(torch.ops.fastvit.patch_embedding_backward.native(grads, tensors, needs, *static))
