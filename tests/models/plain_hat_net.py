"""HAT-Net in plain PyTorch, written from its equations: what our modules and models are compared with.

Parameter names are the official ones, so that weights move both ways. Nothing here uses the library under test. Maps
are dense NCHW throughout, the plainest memory there is.
"""

from __future__ import annotations

from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import nn

VARIANTS = {
    "hat_net_tiny": {"dims": (48, 96, 240, 384), "head_dim": 48, "depths": (2, 2, 6, 3)},
    "hat_net_small": {"dims": (64, 128, 320, 512), "depths": (2, 3, 8, 3)},
    "hat_net_medium": {"dims": (64, 128, 320, 512), "depths": (3, 6, 18, 3), "kernels": (5, 3, 5, 3)},
    "hat_net_large": {"dims": (64, 128, 320, 640), "depths": (3, 8, 27, 3)},
}


def group_norm(channels):
    """Mean and variance over all channels and pixels of a sample."""
    return nn.GroupNorm(1, channels, eps=1e-6)


def softmax_attention(q, k, v):
    """Rows `[..., N, d]`; the scale is that of a head, and goes on the queries."""
    return (q * q.shape[-1] ** -0.5 @ k.mT).softmax(-1) @ v


def split_heads(x, heads):
    """`[B, h * d, pixels...]` to `[B, h, pixels, d]`."""
    return x.flatten(2).unflatten(1, (heads, -1)).mT


def merge_heads(x, height, width):
    return x.mT.flatten(1, 2).unflatten(2, (height, width))


def attend(q, k, v, heads):
    """Every pixel of q's map to every pixel of k's and v's."""
    out = softmax_attention(*(split_heads(t, heads) for t in (q, k, v)))
    return merge_heads(out, *q.shape[2:])


def attend_in_window_slices(q, k, v, heads, side):
    """Window by window; those at the right and at the bottom hold what is left of the map."""
    out = torch.empty_like(v)
    for top in range(0, q.shape[2], side):
        for left in range(0, q.shape[3], side):
            window = (..., slice(top, top + side), slice(left, left + side))
            out[window] = attend(q[window], k[window], v[window], heads)
    return out


def attend_in_whole_windows(q, k, v, heads, side):
    """All windows at once, as one would write it for speed; sides have to be multiples of the window's."""
    batch, channels, height, width = q.shape
    down, across, width_of_head = height // side, width // side, channels // heads

    def cut(x):
        x = x.reshape(batch, heads, width_of_head, down, side, across, side)
        return x.permute(0, 1, 3, 5, 4, 6, 2).reshape(-1, side * side, width_of_head)

    out = softmax_attention(cut(q), cut(k), cut(v))
    out = out.reshape(batch, heads, down, across, side, side, width_of_head)
    return out.permute(0, 1, 6, 2, 4, 3, 5).reshape(batch, channels, height, width)


def attend_in_windows(q, k, v, heads, side):
    whole = q.shape[2] % side == 0 and q.shape[3] % side == 0
    return (attend_in_whole_windows if whole else attend_in_window_slices)(q, k, v, heads, side)


class Attention(nn.Module):
    def __init__(self, dim, head_dim, grid_size=1, ds_ratio=1, drop=0.0):
        super().__init__()
        self.heads, self.grid_size = dim // head_dim, grid_size
        self.norm = group_norm(dim)
        self.qkv = nn.Conv2d(dim, 3 * dim, 1)
        self.proj = nn.Conv2d(dim, dim, 1)
        self.proj_norm = group_norm(dim)
        self.drop = nn.Dropout2d(drop)
        if grid_size > 1:
            self.grid_norm = group_norm(dim)
            # Squares that the map's edge cuts average the pixels they have.
            self.avg_pool = nn.AvgPool2d(ds_ratio, ds_ratio, ceil_mode=True)
            self.ds_norm = group_norm(dim)
            self.q = nn.Conv2d(dim, dim, 1)
            self.kv = nn.Conv2d(dim, 2 * dim, 1)

    def forward(self, x):
        q, k, v = self.qkv(self.norm(x)).chunk(3, dim=1)
        if self.grid_size == 1:
            return self.drop(self.proj(attend(q, k, v, self.heads)))
        a = self.grid_norm(x + attend_in_windows(q, k, v, self.heads, self.grid_size))
        k, v = self.kv(self.ds_norm(self.avg_pool(a))).chunk(2, dim=1)
        return self.drop(self.proj(attend(self.q(a), k, v, self.heads) + a))


class Mlp(nn.Module):
    def __init__(self, dim, hidden, kernel):
        super().__init__()
        depthwise = nn.Conv2d(hidden, hidden, kernel, padding=kernel // 2, groups=hidden, bias=False)
        self.conv1 = nn.Sequential(group_norm(dim), nn.Conv2d(dim, hidden, 1, bias=False), nn.SiLU())
        self.conv2 = nn.Sequential(depthwise, nn.SiLU())
        self.conv3 = nn.Sequential(nn.Conv2d(hidden, dim, 1, bias=False), group_norm(dim))

    def forward(self, x):
        return self.conv3(self.conv2(self.conv1(x)))


class Block(nn.Module):
    def __init__(self, dim, head_dim, grid_size, ds_ratio, expansion, kernel):
        super().__init__()
        self.attn = Attention(dim, head_dim, grid_size, ds_ratio)
        self.conv = Mlp(dim, dim * expansion, kernel)

    def forward(self, x):
        x = x + self.attn(x)
        return x + self.conv(x)


def downsample(channels, dim):
    conv = nn.Conv2d(channels, dim, 3, stride=2, padding=1)
    return nn.Sequential(OrderedDict(conv=conv, norm=group_norm(dim)))


class HATNet(nn.Module):
    """Without any dropout."""

    def __init__(
        self,
        dims=(64, 128, 320, 512),
        head_dim=64,
        depths=(2, 3, 8, 3),
        kernels=(3, 3, 3, 3),
        expansions=(8, 8, 4, 4),
        grid_sizes=(8, 7, 7, 1),
        ds_ratios=(8, 4, 2, 1),
        num_classes=1000,
    ):
        super().__init__()
        stem = (nn.Conv2d(3, 16, 3, stride=2, padding=1), nn.Conv2d(16, dims[0], 3, stride=2, padding=1))
        self.patch_embed = nn.Sequential(stem[0], group_norm(16), nn.SiLU(), stem[1])
        per_stage = zip(dims, depths, kernels, expansions, grid_sizes, ds_ratios, strict=True)
        self.blocks = nn.ModuleList(
            nn.ModuleList(Block(dim, head_dim, grid, ratio, expansion, kernel) for _ in range(depth))
            for dim, depth, kernel, expansion, grid, ratio in per_stage
        )
        self.ds2, self.ds3, self.ds4 = (downsample(*pair) for pair in zip(dims, dims[1:], strict=False))
        self.classifier = nn.Sequential(nn.Identity(), nn.Linear(dims[-1], num_classes))

    def stages(self, x):
        """Every stage's map."""
        found = []
        for stage, down in zip(self.blocks, (self.patch_embed, self.ds2, self.ds3, self.ds4), strict=True):
            x = down(x)
            for block in stage:
                x = block(x)
            found.append(x)
        return found

    def forward(self, x):
        return self.classifier(F.adaptive_avg_pool2d(self.stages(x)[-1], 1).flatten(1))
