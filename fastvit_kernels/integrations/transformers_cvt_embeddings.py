"""transformers' CvT: the convolution in front of a stage, on the fused operator."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.models.cvt import modeling_cvt as host

from fastvit_kernels.integrations.adapter import Adapter, state_of
from fastvit_kernels.nn import fused
from fastvit_kernels.ops.arguments import compute_dtype


class FusedCvtConvEmbeddings(host.CvtConvEmbeddings):
    """`CvtConvEmbeddings` on `patch_embedding`."""

    def forward(self, pixel_values: Tensor) -> Tensor:
        """`[B, C, H, W]` to `[B, C_out, H', W']`, here in channels-last memory."""
        if fused.patch_embedding_obstacles(self.projection, self.normalization):
            return super().forward(pixel_values)
        out = _embed(self, pixel_values)
        # Only on a GPU does autocast run LayerNorm in fp32; elsewhere the host returns what its convolution does.
        return out if out.is_cuda else out.to(compute_dtype(pixel_values))


def _embed(module: host.CvtConvEmbeddings, x: Tensor) -> Tensor:
    state = state_of(module)
    return fused.patch_embedding(x, module.projection, module.normalization, packed=state.packed, backend=state.backend)


def _unfused(module: nn.Module) -> list[str]:
    assert isinstance(module, host.CvtConvEmbeddings)
    return fused.patch_embedding_obstacles(module.projection, module.normalization)


def _obstacles(module: nn.Module) -> list[str]:
    replaced = ["its forward was replaced on the instance"] if "forward" in module.__dict__ else []
    return _unfused(module) + replaced


def _pack(module: nn.Module) -> None:
    """Run once on a map as small as the filter: packing needs a call, and any size will do."""
    assert isinstance(module, host.CvtConvEmbeddings)
    if not _unfused(module):
        weight = module.projection.weight
        with torch.no_grad():
            _embed(module, weight.new_zeros((1, *weight.shape[1:])))


ADAPTER = Adapter(
    host=host.CvtConvEmbeddings,
    fused=FusedCvtConvEmbeddings,
    operators=("patch_embedding",),
    obstacles=_obstacles,
    unfused=_unfused,
    pack=_pack,
)
