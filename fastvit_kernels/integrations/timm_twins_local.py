"""timm's Twins: the attention inside windows by itself, outside of a block of timm's."""

from __future__ import annotations

from timm.models import twins as host
from torch import Tensor

from fastvit_kernels.integrations.timm_twins_attention import adapter_of_attention, forward


class FusedLocallyGroupedAttn(host.LocallyGroupedAttn):
    """`LocallyGroupedAttn` on `local_attention`."""

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """`[B, H*W, C]` to `[B, H*W, C]`, `size` being `(H, W)`."""
        return forward(self, x, size)


ADAPTER = adapter_of_attention(host.LocallyGroupedAttn, FusedLocallyGroupedAttn, ("local_attention",))
