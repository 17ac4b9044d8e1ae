"""PVTv2, MiT and SegFormer in plain PyTorch, as one would write them for speed: what our models are timed against.

Parameter names are the official ones, so that weights move both ways. All LayerNorms share one epsilon, as in
transformers. Nothing here uses the fused operators or their references.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvit_kernels.bench.plain_attention import attend
from fastvit_kernels.bench.plain_cmt import to_map, to_tokens
from fastvit_kernels.models import mit

# Those of MiT are PVTv2's, too.
SIZES = {size: {"dims": sizes["embed_dims"], "depths": sizes["depths"]} for size, sizes in mit.VARIANTS.items()}
PVT: dict[str, Any] = {"ratios": (8, 8, 4, 4), "eps": 1e-6}
VARIANTS: dict[str, dict[str, Any]] = {
    **{f"pvt_v2_{size}": {**PVT, **sizes} for size, sizes in SIZES.items()},
    "pvt_v2_b5": {"ratios": (4, 4, 4, 4), "eps": 1e-6, **SIZES["b5"]},
    "pvt_v2_b2_li": {**PVT, **SIZES["b2"], "linear": True},
    **{f"mit_{size}": {**sizes, "eps": 1e-5} for size, sizes in SIZES.items()},
    **{
        f"segformer_{size}": {
            **sizes,
            "eps": 1e-5,
            "decoder_dim": 256 if size in ("b0", "b1") else 768,
            "num_classes": 150,
        }
        for size, sizes in SIZES.items()
    },
}
# Side of the map that linear attention has keys and values of.
POOLED = 7


class Attention(nn.Module):
    """Keys and values of a map that a convolution makes smaller; a reduction of 1: of the tokens themselves.

    `linear`: of a map of one size whatever that of the tokens' is, through a 1 x 1 convolution.
    """

    def __init__(self, dim: int, heads: int, reduction: int, eps: float, linear: bool) -> None:
        super().__init__()
        self.heads, self.reduction, self.linear = heads, 1 if linear else reduction, linear
        self.q, self.kv, self.proj = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim), nn.Linear(dim, dim)
        if linear or reduction > 1:
            self.sr = nn.Conv2d(dim, dim, self.reduction, stride=self.reduction)
            self.norm = nn.LayerNorm(dim, eps)

    def forward(self, u: Tensor, h: int, w: int) -> Tensor:
        k, v = self.kv(self._reduced(u, h, w)).chunk(2, -1)
        out: Tensor = self.proj(attend(self.q(u), k, v, self.heads))
        return out

    def _reduced(self, u: Tensor, h: int, w: int) -> Tensor:
        if self.linear:
            return F.gelu(self.norm(to_tokens(self.sr(F.adaptive_avg_pool2d(to_map(u, h, w), POOLED)))))
        return self.norm(to_tokens(self.sr(to_map(u, h, w)))) if self.reduction > 1 else u


class Depthwise(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dwconv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)

    def forward(self, x: Tensor, h: int, w: int) -> Tensor:
        return to_tokens(self.dwconv(to_map(x, h, w)))


class Mlp(nn.Module):
    def __init__(self, dim: int, hidden: int, linear: bool) -> None:
        super().__init__()
        self.linear = linear
        self.fc1, self.fc2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)
        self.dwconv = Depthwise(hidden)

    def forward(self, u: Tensor, h: int, w: int) -> Tensor:
        hidden = F.relu(self.fc1(u)) if self.linear else self.fc1(u)
        out: Tensor = self.fc2(F.gelu(self.dwconv(hidden, h, w)))
        return out


class Block(nn.Module):
    def __init__(self, dim: int, heads: int, reduction: int, hidden: int, eps: float, linear: bool) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps), nn.LayerNorm(dim, eps)
        self.attn = Attention(dim, heads, reduction, eps, linear)
        self.mlp = Mlp(dim, hidden, linear)

    def forward(self, x: Tensor, h: int, w: int) -> Tensor:
        x = x + self.attn(self.norm1(x), h, w)
        return x + self.mlp(self.norm2(x), h, w)


class Embed(nn.Module):
    def __init__(self, dim_in: int, dim: int, size: int, stride: int, eps: float) -> None:
        super().__init__()
        self.proj = nn.Conv2d(dim_in, dim, size, stride, size // 2)
        self.norm = nn.LayerNorm(dim, eps)

    def forward(self, x: Tensor) -> tuple[Tensor, int, int]:
        maps = self.proj(x)
        return self.norm(to_tokens(maps)), maps.shape[2], maps.shape[3]


class PVTv2(nn.Module):
    """PVTv2, and MiT with the `ratios` of its MLPs; without any dropout. `num_classes=0` for a backbone.

    `linear`: with linear attention, and ReLUs in its MLPs.
    """

    def __init__(
        self,
        dims: Sequence[int] = (64, 128, 320, 512),
        depths: Sequence[int] = (3, 4, 6, 3),
        ratios: Sequence[int] = (4, 4, 4, 4),
        reductions: Sequence[int] = (8, 4, 2, 1),
        eps: float = 1e-6,
        num_classes: int = 1000,
        linear: bool = False,
    ) -> None:
        super().__init__()
        heads = (1, 2, 5, 8)
        self.num_stages = len(dims)
        for index, (before, dim) in enumerate(zip((3, *dims), dims, strict=False)):
            setattr(self, f"patch_embed{index + 1}", Embed(before, dim, *((3, 2) if index else (7, 4)), eps))
            sizes = (dim, heads[index], reductions[index], ratios[index] * dim, eps, linear)
            setattr(self, f"block{index + 1}", nn.ModuleList(Block(*sizes) for _ in range(depths[index])))
            setattr(self, f"norm{index + 1}", nn.LayerNorm(dim, eps))
        if num_classes:
            self.head = nn.Linear(dims[-1], num_classes)

    def stages(self, x: Tensor) -> list[Tensor]:
        """Every stage's map."""
        found = []
        for index in range(1, self.num_stages + 1):
            tokens, h, w = getattr(self, f"patch_embed{index}")(x)
            for block in getattr(self, f"block{index}"):
                tokens = block(tokens, h, w)
            x = to_map(getattr(self, f"norm{index}")(tokens), h, w)
            found.append(x)
        return found

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.stages(x)[-1].mean((2, 3)))
        return logits


class Projection(nn.Module):
    def __init__(self, dim_in: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Linear(dim_in, dim)

    def forward(self, x: Tensor, size: Sequence[int]) -> Tensor:
        maps = to_map(self.proj(to_tokens(x)), *x.shape[2:])
        return F.interpolate(maps, list(size), mode="bilinear", align_corners=False)


class Fusion(nn.Module):
    def __init__(self, dim_in: int, dim: int) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(dim_in, dim, 1, bias=False), nn.BatchNorm2d(dim)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


class Head(nn.Module):
    """All maps projected, enlarged to the largest, joined smallest first."""

    def __init__(self, dims: Sequence[int], dim: int, num_classes: int) -> None:
        super().__init__()
        self.num_stages = len(dims)
        for stage in range(self.num_stages, 0, -1):
            setattr(self, f"linear_c{stage}", Projection(dims[stage - 1], dim))
        self.linear_fuse = Fusion(self.num_stages * dim, dim)
        self.linear_pred = nn.Conv2d(dim, num_classes, 1)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        size = maps[0].shape[2:]
        stages = range(self.num_stages, 0, -1)
        joined = torch.cat([getattr(self, f"linear_c{stage}")(maps[stage - 1], size) for stage in stages], 1)
        logits: Tensor = self.linear_pred(self.linear_fuse(joined))
        return logits


class SegFormer(nn.Module):
    """A quarter of the image's size each way, as the original in front of its last enlargement."""

    def __init__(self, decoder_dim: int, num_classes: int, **backbone: Any) -> None:
        super().__init__()
        self.backbone = PVTv2(**backbone, num_classes=0)
        self.decode_head = Head(backbone["dims"], decoder_dim, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.decode_head(self.backbone.stages(x))
        return logits
