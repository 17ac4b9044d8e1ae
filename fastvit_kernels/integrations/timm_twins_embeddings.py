"""timm's Twins: the convolution in front of a stage, on the fused operator."""

from __future__ import annotations

from timm.models import twins as host
from torch import Tensor

from fastvit_kernels.integrations.embeddings import adapter_of_embedding, embed


class FusedTwinsPatchEmbed(host.PatchEmbed):
    """`PatchEmbed` on `patch_embedding`."""

    def forward(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """`[B, C, H, W]` to `[B, H'*W', C_out]` and `(H', W')`."""
        maps = embed(self, x, self.proj, self.norm)
        if maps is None:
            return super().forward(x)
        return maps.flatten(2).transpose(1, 2), (maps.shape[2], maps.shape[3])


ADAPTER = adapter_of_embedding(host.PatchEmbed, FusedTwinsPatchEmbed, "proj", "norm")
