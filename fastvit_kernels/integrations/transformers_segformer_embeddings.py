"""transformers' Segformer: the convolution in front of a stage, on the fused operator."""

from __future__ import annotations

from torch import Tensor
from transformers.models.segformer import modeling_segformer as host

from fastvit_kernels.integrations.embeddings import adapter_of_embedding, embed


class FusedSegformerOverlapPatchEmbeddings(host.SegformerOverlapPatchEmbeddings):
    """`SegformerOverlapPatchEmbeddings` on `patch_embedding`."""

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, int, int]:
        """`[B, C, H, W]` to `[B, H'*W', C_out]`, H' and W'."""
        maps = embed(self, pixel_values, self.proj, self.layer_norm)
        if maps is None:
            return super().forward(pixel_values)
        return maps.flatten(2).transpose(1, 2), maps.shape[2], maps.shape[3]


ADAPTER = adapter_of_embedding(
    host.SegformerOverlapPatchEmbeddings, FusedSegformerOverlapPatchEmbeddings, "proj", "layer_norm"
)
