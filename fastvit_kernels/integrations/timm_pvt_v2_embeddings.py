"""timm's PVTv2: the convolution in front of a stage, on the fused operator."""

from __future__ import annotations

from timm.models import pvt_v2 as host
from torch import Tensor

from fastvit_kernels.integrations.embeddings import adapter_of_embedding, embed


class FusedOverlapPatchEmbed(host.OverlapPatchEmbed):
    """`OverlapPatchEmbed` on `patch_embedding`."""

    def forward(self, x: Tensor) -> Tensor:
        """`[B, C, H, W]` to `[B, H', W', C_out]`."""
        maps = embed(self, x, self.proj, self.norm)
        return super().forward(x) if maps is None else maps.permute(0, 2, 3, 1)


ADAPTER = adapter_of_embedding(host.OverlapPatchEmbed, FusedOverlapPatchEmbed, "proj", "norm")
