"""transformers' CvT: the convolution in front of a stage, on the fused operator."""

from __future__ import annotations

from torch import Tensor
from transformers.models.cvt import modeling_cvt as host

from fastvit_kernels.integrations.embeddings import adapter_of_embedding, embed


class FusedCvtConvEmbeddings(host.CvtConvEmbeddings):
    """`CvtConvEmbeddings` on `patch_embedding`."""

    def forward(self, pixel_values: Tensor) -> Tensor:
        """`[B, C, H, W]` to `[B, C_out, H', W']`, here in channels-last memory."""
        maps = embed(self, pixel_values, self.projection, self.normalization)
        return super().forward(pixel_values) if maps is None else maps


ADAPTER = adapter_of_embedding(host.CvtConvEmbeddings, FusedCvtConvEmbeddings, "projection", "normalization")
