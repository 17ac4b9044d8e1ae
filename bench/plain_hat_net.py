"""HAT-Net in plain PyTorch, written from its equations as one would for speed: what our model is timed against.

Parameter names are the official ones, so that weights move both ways. Maps are NCHW tensors of any memory format.
Nothing here uses the fused operators or their references, whose norms are made for exactness.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from fastvit_kernels.bench.plain_attention import softmax_attention

VARIANTS: dict[str, dict[str, object]] = {
    "hat_net_tiny": {"dims": (48, 96, 240, 384), "head_dim": 48, "depths": (2, 2, 6, 3)},
    "hat_net_small": {"dims": (64, 128, 320, 512), "depths": (2, 3, 8, 3)},
    "hat_net_medium": {"dims": (64, 128, 320, 512), "depths": (3, 6, 18, 3), "kernels": (5, 3, 5, 3)},
    "hat_net_large": {"dims": (64, 128, 320, 640), "depths": (3, 8, 27, 3)},
}


def group_norm(channels: int) -> nn.GroupNorm:
    """Mean and variance over all channels and pixels of a sample."""
    return nn.GroupNorm(1, channels, eps=1e-6)


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """Every pixel of q's map to every pixel of k's and v's."""
    rows = (t.flatten(2).unflatten(1, (heads, -1)).mT for t in (q, k, v))
    return softmax_attention(*rows).mT.flatten(1, 2).unflatten(2, q.shape[2:])


def attend_in_windows(q: Tensor, k: Tensor, v: Tensor, heads: int, side: int) -> Tensor:
    """All windows at once; the map's sides are multiples of the window's."""
    batch, channels, height, width = q.shape
    down, across, width_of_head = height // side, width // side, channels // heads

    def cut(x: Tensor) -> Tensor:
        x = x.reshape(batch, heads, width_of_head, down, side, across, side)
        return x.permute(0, 1, 3, 5, 4, 6, 2).reshape(batch, -1, side * side, width_of_head)

    out = softmax_attention(cut(q), cut(k), cut(v))
    out = out.reshape(batch, heads, down, across, side, side, width_of_head)
    return out.permute(0, 1, 6, 2, 4, 3, 5).reshape(batch, channels, height, width)


class Attention(nn.Module):
    def __init__(self, dim: int, head_dim: int, grid_size: int = 1, ds_ratio: int = 1, drop: float = 0.0) -> None:
        super().__init__()
        self.heads, self.grid_size = dim // head_dim, grid_size
        self.norm = group_norm(dim)
        self.qkv = nn.Conv2d(dim, 3 * dim, 1)
        self.proj = nn.Conv2d(dim, dim, 1)
        self.proj_norm = group_norm(dim)
        self.drop = nn.Dropout2d(drop)
        if grid_size > 1:
            self.grid_norm = group_norm(dim)
            self.avg_pool = nn.AvgPool2d(ds_ratio, ds_ratio)
            self.ds_norm = group_norm(dim)
            self.q = nn.Conv2d(dim, dim, 1)
            self.kv = nn.Conv2d(dim, 2 * dim, 1)

    def attend_in_windows(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend_in_windows(q, k, v, self.heads, self.grid_size)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).chunk(3, dim=1)
        if self.grid_size == 1:
            mixed = attend(q, k, v, self.heads)
        else:
            a = self.grid_norm(x + self.attend_in_windows(q, k, v))
            k, v = self.kv(self.ds_norm(self.avg_pool(a))).chunk(2, dim=1)
            mixed = attend(self.q(a), k, v, self.heads) + a
        out: Tensor = self.drop(self.proj(mixed))
        return out


class Mlp(nn.Module):
    def __init__(self, dim: int, hidden: int, kernel: int) -> None:
        super().__init__()
        depthwise = nn.Conv2d(hidden, hidden, kernel, padding=kernel // 2, groups=hidden, bias=False)
        self.conv1 = nn.Sequential(group_norm(dim), nn.Conv2d(dim, hidden, 1, bias=False), nn.SiLU())
        self.conv2 = nn.Sequential(depthwise, nn.SiLU())
        self.conv3 = nn.Sequential(nn.Conv2d(hidden, dim, 1, bias=False), group_norm(dim))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv3(self.conv2(self.conv1(x)))
        return out


class Block(nn.Module):
    def __init__(self, attention: nn.Module, mlp: nn.Module) -> None:
        super().__init__()
        self.attn = attention
        self.conv = mlp

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(x)
        return x + self.conv(x)


def downsample(channels: int, dim: int) -> nn.Module:
    conv = nn.Conv2d(channels, dim, 3, stride=2, padding=1)
    return nn.Sequential(OrderedDict(conv=conv, norm=group_norm(dim)))


class HATNet(nn.Module):
    """Without any dropout."""

    def __init__(
        self,
        dims: Sequence[int] = (64, 128, 320, 512),
        head_dim: int = 64,
        depths: Sequence[int] = (2, 3, 8, 3),
        kernels: Sequence[int] = (3, 3, 3, 3),
        expansions: Sequence[int] = (8, 8, 4, 4),
        grid_sizes: Sequence[int] = (8, 7, 7, 1),
        ds_ratios: Sequence[int] = (8, 4, 2, 1),
        num_classes: int = 1000,
        attention: type[Attention] = Attention,
    ) -> None:
        super().__init__()
        stem = (nn.Conv2d(3, 16, 3, stride=2, padding=1), nn.Conv2d(16, dims[0], 3, stride=2, padding=1))
        self.patch_embed = nn.Sequential(stem[0], group_norm(16), nn.SiLU(), stem[1])
        per_stage = zip(dims, depths, kernels, expansions, grid_sizes, ds_ratios, strict=True)
        self.blocks = nn.ModuleList(
            nn.ModuleList(
                Block(attention(dim, head_dim, grid, ratio), Mlp(dim, dim * expansion, kernel)) for _ in range(depth)
            )
            for dim, depth, kernel, expansion, grid, ratio in per_stage
        )
        self.ds2, self.ds3, self.ds4 = (downsample(*pair) for pair in zip(dims, dims[1:], strict=False))
        self.classifier = nn.Sequential(nn.Identity(), nn.Linear(dims[-1], num_classes))

    def stages(self, x: Tensor) -> list[Tensor]:
        """Every stage's map."""
        found = []
        for stage, down in zip(self.blocks, (self.patch_embed, self.ds2, self.ds3, self.ds4), strict=True):
            assert isinstance(stage, nn.ModuleList)
            x = down(x)
            for block in stage:
                x = block(x)
            found.append(x)
        return found

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.classifier(F.adaptive_avg_pool2d(self.stages(x)[-1], 1).flatten(1))
        return logits
