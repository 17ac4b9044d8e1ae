"""DHVT in plain PyTorch, written from its equations as one would for speed: what our model is compared with.

Parameter names are the official ones, so that weights move both ways. Nothing here uses the fused operators or their
references.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvit_kernels.bench.plain_attention import attend

TINY, SMALL = 192, 384
VARIANTS: dict[str, dict[str, Any]] = {
    "dhvt_tiny_cifar_patch4": {"side": 32, "patch": 4, "dim": TINY, "heads": 4, "num_classes": 100},
    "dhvt_small_cifar_patch4": {"side": 32, "patch": 4, "dim": SMALL, "heads": 8, "num_classes": 100},
    "dhvt_tiny_cifar_patch2": {"side": 32, "patch": 2, "dim": TINY, "heads": 4, "num_classes": 100},
    "dhvt_small_cifar_patch2": {"side": 32, "patch": 2, "dim": SMALL, "heads": 8, "num_classes": 100},
    "dhvt_tiny_domain_patch16": {"side": 224, "patch": 16, "dim": TINY, "heads": 4, "num_classes": 345},
    "dhvt_small_domain_patch16": {"side": 224, "patch": 16, "dim": SMALL, "heads": 6, "num_classes": 345},
    "dhvt_tiny_imagenet_patch16": {"side": 224, "patch": 16, "dim": TINY, "heads": 3, "num_classes": 1000},
    "dhvt_small_imagenet_patch16": {"side": 224, "patch": 16, "dim": SMALL, "heads": 6, "num_classes": 1000},
}


class Affine(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.ones(1, channels, 1, 1))
        self.beta = nn.Parameter(torch.zeros(1, channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.alpha * x + self.beta


class Embed(nn.Module):
    def __init__(self, patch: int, dim: int) -> None:
        super().__init__()
        widths = {16: (dim // 8, dim // 4, dim // 2, dim), 4: (dim // 2, dim), 2: (dim,)}[patch]
        steps: list[nn.Module] = []
        for before, width in zip((3, *widths), widths, strict=False):
            conv = nn.Conv2d(before, width, 3, stride=2, padding=1, bias=False)
            steps += [nn.Sequential(conv, nn.BatchNorm2d(width)), nn.GELU()]
        # Only a lone convolution has an activation behind it.
        self.proj = nn.Sequential(*(steps if len(widths) == 1 else steps[:-1]))
        self.pre_affine, self.post_affine = Affine(3), Affine(dim)

    def forward(self, x: Tensor) -> Tensor:
        maps: Tensor = self.post_affine(self.proj(self.pre_affine(x)))
        return maps.flatten(2).mT


class Attention(nn.Module):
    def __init__(self, dim: int, heads: int, qkv_bias: bool = True) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        self.ht_proj = nn.Linear(dim // heads, dim)
        self.ht_norm = nn.LayerNorm(dim // heads, eps=1e-5)
        self.pos_embed = nn.Parameter(torch.zeros(1, heads, dim))

    def head_tokens(self, u: Tensor) -> Tensor:
        """A token for each head, of the mean over all tokens of the head's channels."""
        means = u.mean(1).unflatten(-1, (self.heads, -1))
        slices = self.ht_norm(self.ht_proj(means).unflatten(-1, (self.heads, -1)))
        return F.gelu(slices).flatten(2) + self.pos_embed

    def forward(self, u: Tensor) -> Tensor:
        tokens = torch.cat([u, self.head_tokens(u)], 1)
        q, k, v = self.qkv(tokens).chunk(3, -1)
        out = self.proj(attend(q, k, v, self.heads))
        rows, heads = out.split([u.shape[1], self.heads], 1)
        cls = rows[:, :1] + heads.mean(1, keepdim=True)
        return torch.cat([cls, rows[:, 1:]], 1)


class Mlp(nn.Module):
    """The map through convolutions, the class token through a gate made of their result; no sigmoid."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(dim, hidden, 1), nn.BatchNorm2d(hidden)
        self.conv2, self.bn2 = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden), nn.BatchNorm2d(hidden)
        self.conv3, self.bn3 = nn.Conv2d(hidden, dim, 1), nn.BatchNorm2d(dim)
        self.compress, self.excitation = nn.Linear(dim, dim // 4), nn.Linear(dim // 4, dim)

    def forward(self, u: Tensor) -> Tensor:
        cls, patches = u[:, :1], u[:, 1:]
        side = round(patches.shape[1] ** 0.5)
        s = F.gelu(self.bn1(self.conv1(patches.mT.unflatten(2, (side, side)))))
        s = s + F.gelu(self.bn2(self.conv2(s)))
        z = self.bn3(self.conv3(s))
        gate = self.excitation(F.gelu(self.compress(z.mean((2, 3)))))
        return torch.cat([cls * gate[:, None], z.flatten(2).mT], 1)


class Block(nn.Module):
    def __init__(self, dim: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, hidden)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class DHVT(nn.Module):
    """For square images, without any dropout; `side` is that of the published ones."""

    def __init__(self, side: int, patch: int, dim: int, heads: int, num_classes: int, depth: int = 12) -> None:
        super().__init__()
        self.side = side
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.patch_embed = Embed(patch, dim)
        self.blocks = nn.ModuleList(Block(dim, heads, 4 * dim) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.head = nn.Linear(dim, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embed(x)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1)
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.norm(x)[:, 0])
        return logits
