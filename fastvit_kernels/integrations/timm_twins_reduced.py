"""timm's Twins: the attention to a reduced map by itself, outside of a block of timm's."""

from __future__ import annotations

from timm.models import twins as host
from torch import Tensor

from fastvit_kernels.integrations.timm_twins_attention import adapter_of_attention, forward
from fastvit_kernels.nn.fused_spatial_reduction import OPERATORS


class FusedGlobalSubSampleAttn(host.GlobalSubSampleAttn):
    """`GlobalSubSampleAttn` on `patch_embedding` and `global_attention`."""

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """`[B, H*W, C]` to `[B, H*W, C]`, `size` being `(H, W)`."""
        return forward(self, x, size)


ADAPTER = adapter_of_attention(host.GlobalSubSampleAttn, FusedGlobalSubSampleAttn, OPERATORS)
