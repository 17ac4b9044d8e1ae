"""The strided convolution in front of a stage."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastvit_kernels.nn import checks, fused
from fastvit_kernels.nn.layer_norm import LayerNorm
from fastvit_kernels.ops.packing import PackedWeights


class PatchEmbedding(nn.Module):
    """Strided convolution and LayerNorm over the channels: CvT's `ConvEmbed`, fused.

    Parameter names (`proj`, `norm`) and initialisation are those of the official module, so weights load both ways with
    `strict=True`. What the fused operator cannot stand in for (`fusion_obstacles` lists it) runs by calling the
    submodules.

    Args:
        patch_size: side of the square filter.
        in_chans: channels of the input.
        embed_dim: channels of the output.
        stride, padding: of the convolution.
        eps: epsilon of the LayerNorm.

    Attributes:
        backend: runs this module's operator on one backend; None for the usual choice.

    Source: Wu et al., "CvT: Introducing Convolutions to Vision Transformers", section 3.1.
    """

    backend: str | None = None

    def __init__(
        self,
        patch_size: int = 7,
        in_chans: int = 3,
        embed_dim: int = 64,
        stride: int = 4,
        padding: int = 2,
        eps: float = 1e-5,
    ) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_chans, embed_dim, patch_size, stride, padding)
        self.norm = LayerNorm(embed_dim, eps)
        self._packed: dict[str, PackedWeights] | None = None

    def forward(self, x: Tensor, *, in_norm: nn.LayerNorm | None = None) -> Tensor:
        """`[B, C, H, W]`, best in channels-last memory, to a channels-last `[B, embed_dim, H', W']`.

        `in_norm` is a LayerNorm of the pixels in front; in inference on prepared weights it is fused.
        """
        checks.check_map("x", x, checks.input_channels(self._modules["proj"]))
        if in_norm is not None and not self.fuses(in_norm):
            x, in_norm = in_norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2), None
        if not self.fusion_obstacles():
            return fused.patch_embedding(
                x, self.proj, self.norm, in_norm=in_norm, packed=self._packed, backend=self.backend
            )
        # Only an image in NCHW memory is copied here; the maps between stages are channels-last already.
        tokens = self.proj(x.contiguous(memory_format=torch.channels_last)).permute(0, 2, 3, 1)
        if tokens.dtype is not x.dtype:
            # Autocast chose the convolution's dtype; the norm's result is fp32 then, as the operator's.
            tokens = tokens.to(torch.promote_types(tokens.dtype, torch.float32))
        return self.norm(tokens).permute(0, 3, 1, 2)

    def fuses(self, in_norm: nn.LayerNorm) -> bool:
        """Whether `forward` would compute this norm in front along with the rest now."""
        prepared = self._packed is not None and not torch.is_grad_enabled()
        return prepared and not self.fusion_obstacles() and not fused.layer_norm_obstacles(in_norm)

    def fusion_obstacles(self) -> list[str]:
        """Every reason why `forward` would call submodules now instead of the fused operator."""
        return fused.patch_embedding_obstacles(self.proj, self.norm)

    def prepare_inference(self, enabled: bool) -> None:
        """Keep the weights in the layout of the CPU kernels between calls (`enabled`), or stop doing so."""
        self._packed = {"patch_embedding": PackedWeights()} if enabled else None
