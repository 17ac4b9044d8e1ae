"""CMT in plain PyTorch, written from its equations as one would for speed: what our model is compared with.

Parameter names are the official ones, so that weights move both ways. Nothing here uses the fused operators or their
references.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvit_kernels.bench.plain_attention import attend

VARIANTS: dict[str, dict[str, Any]] = {
    "cmt_ti": {"side": 160, "stem": 16, "dims": (46, 92, 184, 368), "depths": (2, 2, 10, 2), "ratio": 3.6},
    "cmt_xs": {"side": 192, "stem": 16, "dims": (52, 104, 208, 416), "depths": (3, 3, 12, 3), "ratio": 3.77},
    "cmt_s": {"side": 224, "stem": 32, "dims": (64, 128, 256, 512), "depths": (3, 3, 16, 3), "ratio": 4.0},
    "cmt_b": {"side": 256, "stem": 38, "dims": (76, 152, 304, 608), "depths": (4, 4, 20, 4), "ratio": 4.0},
}
STAGES = "abcd"
HEADS = (1, 2, 4, 8)
REDUCTIONS = (8, 4, 2, 1)


def to_map(tokens: Tensor, h: int, w: int) -> Tensor:
    """`[B, h*w, C]` as a channels-last `[B, C, h, w]`."""
    return tokens.mT.unflatten(2, (h, w))


def to_tokens(maps: Tensor) -> Tensor:
    return maps.flatten(2).mT


class Attention(nn.Module):
    """Keys and values from a map that is k times smaller each way; k = 1: from the tokens themselves."""

    def __init__(self, dim: int, heads: int, k: int, qkv_bias: bool = True) -> None:
        super().__init__()
        self.heads, self.reduction = heads, k
        self.q, self.k, self.v = (nn.Linear(dim, dim, bias=qkv_bias) for _ in range(3))
        if k > 1:
            self.sr = nn.Sequential(nn.Conv2d(dim, dim, k, stride=k, groups=dim), nn.BatchNorm2d(dim))
        self.proj = nn.Linear(dim, dim)

    def forward(self, u: Tensor, h: int, w: int, relative_pos: Tensor) -> Tensor:
        small = to_tokens(self.sr(to_map(u, h, w))) if self.reduction > 1 else u
        out: Tensor = self.proj(attend(self.q(u), self.k(small), self.v(small), self.heads, relative_pos))
        return out


class Mlp(nn.Module):
    """Every batch norm behind its activation, the inner shortcut in front of it."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.conv1 = nn.Sequential(nn.Conv2d(dim, hidden, 1), nn.GELU(), nn.BatchNorm2d(hidden))
        self.proj = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)
        self.proj_bn = nn.BatchNorm2d(hidden)
        self.conv2 = nn.Sequential(nn.Conv2d(hidden, dim, 1), nn.BatchNorm2d(dim))

    def forward(self, u: Tensor, h: int, w: int) -> Tensor:
        t = self.conv1(to_map(u, h, w))
        t = self.proj_bn(F.gelu(self.proj(t) + t))
        return to_tokens(self.conv2(t))


class Block(nn.Module):
    def __init__(self, dim: int, heads: int, k: int, hidden: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, heads, k)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, hidden)

    def forward(self, x: Tensor, h: int, w: int, relative_pos: Tensor) -> Tensor:
        x = x + to_tokens(self.proj(to_map(x, h, w)))
        x = x + self.attn(self.norm1(x), h, w, relative_pos)
        return x + self.mlp(self.norm2(x), h, w)


class Embed(nn.Module):
    def __init__(self, dim_in: int, dim_out: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(dim_in, dim_out, 2, stride=2)
        self.norm = nn.LayerNorm(dim_out, eps=1e-5)

    def forward(self, x: Tensor) -> tuple[Tensor, int, int]:
        maps = self.proj(x)
        return self.norm(to_tokens(maps)), maps.shape[2], maps.shape[3]


class CMT(nn.Module):
    """For square images of `side` pixels, without any dropout."""

    def __init__(
        self,
        side: int,
        stem: int,
        dims: Sequence[int],
        depths: Sequence[int],
        ratio: float,
        num_classes: int = 1000,
    ) -> None:
        super().__init__()
        for index in (1, 2, 3):
            conv = nn.Conv2d(3 if index == 1 else stem, stem, 3, stride=2 if index == 1 else 1, padding=1)
            setattr(self, f"stem_conv{index}", conv)
            setattr(self, f"stem_norm{index}", nn.BatchNorm2d(stem))
        pixels = (side // 4) ** 2
        for letter, before, dim, depth, heads, k in zip(
            STAGES, (stem, *dims), dims, depths, HEADS, REDUCTIONS, strict=False
        ):
            setattr(self, f"patch_embed_{letter}", Embed(before, dim))
            setattr(self, f"relative_pos_{letter}", nn.Parameter(torch.randn(heads, pixels, pixels // k // k)))
            blocks = [Block(dim, heads, k, int(ratio * dim)) for _ in range(depth)]
            setattr(self, f"blocks_{letter}", nn.ModuleList(blocks))
            pixels //= 4
        self._fc = nn.Conv2d(dims[-1], 1280, 1)
        self._bn = nn.BatchNorm2d(1280)
        self.head = nn.Linear(1280, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        for index in (1, 2, 3):
            x = getattr(self, f"stem_norm{index}")(F.gelu(getattr(self, f"stem_conv{index}")(x)))
        for letter in STAGES:
            tokens, h, w = getattr(self, f"patch_embed_{letter}")(x)
            for block in getattr(self, f"blocks_{letter}"):
                tokens = block(tokens, h, w, getattr(self, f"relative_pos_{letter}"))
            x = to_map(tokens, h, w)
        logits: Tensor = self.head(F.silu(self._bn(self._fc(x))).mean((2, 3)))
        return logits
