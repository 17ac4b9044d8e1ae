"""The bridge to the C++ kernels of patch_embedding."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastvit_kernels.ops.native import cpu_reasons
from fastvit_kernels.ops.operator import GradientKernels, Outputs, Tensors
from fastvit_kernels.ops.patch_embedding.reference import Static, has_bare_scales

# Measured at the stages of PVTv2-B1 (batch 8, fp32 and bf16): up to half a million values the kernels of the gradients
# are faster than recomputing, with 1.5 million slower.
_LARGEST_WEIGHT = 600_000


class Cpu(GradientKernels):
    """C++ for the CPU: each pixel's neighbourhood is gathered in the cache; the LayerNorm runs on finished rows."""

    name = "cpu"
    backward = "patch_embedding_backward", "native"

    def supports(self, tensors: Tensors, static: Static) -> list[str]:
        return cpu_reasons(tensors, static.dtype)

    def run(self, tensors: Tensors, packed: Tensor | None, static: Static) -> Outputs:
        return (torch.ops.fastvit.patch_embedding.default(tensors, packed, *static),)

    def supports_backward(
        self, grads: Sequence[Tensor], tensors: Tensors, needs: Sequence[bool], static: Static
    ) -> list[str]:
        weight = tensors[1]
        assert weight is not None
        reasons = []
        if static.activation != "none" or tensors[9] is not None:
            reasons.append("a batch norm or an activation behind the convolution")
        if has_bare_scales(tensors, static):
            reasons.append("a scale and shift without a norm")
        if weight.numel() > _LARGEST_WEIGHT:
            reasons.append(f"a weight of {weight.numel()} values: beyond {_LARGEST_WEIGHT} recomputing is faster")
        return reasons
