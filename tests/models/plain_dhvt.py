"""DHVT in plain PyTorch, written from its equations: what our modules and models are compared with.

Parameter names are the official ones, so that weights move both ways. Nothing here uses what is under test.
"""

from __future__ import annotations

import torch
from torch import nn

TINY, SMALL = 192, 384
VARIANTS = {
    "dhvt_tiny_cifar_patch4": {"side": 32, "patch": 4, "dim": TINY, "heads": 4, "num_classes": 100},
    "dhvt_small_cifar_patch4": {"side": 32, "patch": 4, "dim": SMALL, "heads": 8, "num_classes": 100},
    "dhvt_tiny_cifar_patch2": {"side": 32, "patch": 2, "dim": TINY, "heads": 4, "num_classes": 100},
    "dhvt_small_cifar_patch2": {"side": 32, "patch": 2, "dim": SMALL, "heads": 8, "num_classes": 100},
    "dhvt_tiny_domain_patch16": {"side": 224, "patch": 16, "dim": TINY, "heads": 4, "num_classes": 345},
    "dhvt_small_domain_patch16": {"side": 224, "patch": 16, "dim": SMALL, "heads": 6, "num_classes": 345},
    "dhvt_tiny_imagenet_patch16": {"side": 224, "patch": 16, "dim": TINY, "heads": 3, "num_classes": 1000},
    "dhvt_small_imagenet_patch16": {"side": 224, "patch": 16, "dim": SMALL, "heads": 6, "num_classes": 1000},
}


def gelu(x):
    return x * (1 + torch.erf(x * 0.5**0.5)) / 2


class Gelu(nn.Module):
    def forward(self, x):
        return gelu(x)


class Affine(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.alpha = nn.Parameter(torch.ones(1, channels, 1, 1))
        self.beta = nn.Parameter(torch.zeros(1, channels, 1, 1))

    def forward(self, x):
        return self.alpha * x + self.beta


class Embed(nn.Module):
    def __init__(self, patch, dim):
        super().__init__()
        widths = {16: (dim // 8, dim // 4, dim // 2, dim), 4: (dim // 2, dim), 2: (dim,)}[patch]
        steps = []
        for before, width in zip((3, *widths), widths, strict=False):
            conv = nn.Conv2d(before, width, 3, stride=2, padding=1, bias=False)
            steps += [nn.Sequential(conv, nn.BatchNorm2d(width)), Gelu()]
        # Only a lone convolution has an activation behind it.
        self.proj = nn.Sequential(*(steps if len(widths) == 1 else steps[:-1]))
        self.pre_affine, self.post_affine = Affine(3), Affine(dim)

    def forward(self, x):
        return self.post_affine(self.proj(self.pre_affine(x))).flatten(2).mT


class Attention(nn.Module):
    def __init__(self, dim, heads, qkv_bias=True):
        super().__init__()
        self.heads, self.width = heads, dim // heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        self.ht_proj = nn.Linear(self.width, dim)
        self.ht_norm = nn.LayerNorm(self.width, eps=1e-5)
        self.pos_embed = nn.Parameter(torch.zeros(1, heads, dim))

    def head_tokens(self, u):
        tokens = []
        for head in range(self.heads):
            mean = u[..., head * self.width : (head + 1) * self.width].mean(1)
            slices = self.ht_proj(mean).split(self.width, -1)
            tokens.append(torch.cat([gelu(self.ht_norm(part)) for part in slices], -1))
        return torch.stack(tokens, 1) + self.pos_embed

    def forward(self, u):
        count = u.shape[1]
        q, k, v = self.qkv(torch.cat([u, self.head_tokens(u)], 1)).chunk(3, -1)
        parts = []
        for head in range(self.heads):
            own = slice(head * self.width, (head + 1) * self.width)
            weights = (q[..., own] @ k[..., own].mT / self.width**0.5).softmax(-1)
            parts.append(weights @ v[..., own])
        out = self.proj(torch.cat(parts, -1))
        cls = out[:, :1] + out[:, count:].mean(1, keepdim=True)
        return torch.cat([cls, out[:, 1:count]], 1)


class Mlp(nn.Module):
    """The map through convolutions, the class token through a gate made of their result; no sigmoid."""

    def __init__(self, dim, hidden):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(dim, hidden, 1), nn.BatchNorm2d(hidden)
        self.conv2, self.bn2 = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden), nn.BatchNorm2d(hidden)
        self.conv3, self.bn3 = nn.Conv2d(hidden, dim, 1), nn.BatchNorm2d(dim)
        self.compress, self.excitation = nn.Linear(dim, dim // 4), nn.Linear(dim // 4, dim)

    def forward(self, u):
        cls, patches = u[:, :1], u[:, 1:]
        side = round(patches.shape[1] ** 0.5)
        s = gelu(self.bn1(self.conv1(patches.mT.reshape(len(u), -1, side, side))))
        s = s + gelu(self.bn2(self.conv2(s)))
        z = self.bn3(self.conv3(s))
        gate = self.excitation(gelu(self.compress(z.mean((2, 3)))))
        return torch.cat([cls * gate[:, None], z.flatten(2).mT], 1)


class Block(nn.Module):
    def __init__(self, dim, heads, hidden):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, hidden)

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class DHVT(nn.Module):
    def __init__(self, side, patch, dim, heads, num_classes, depth=12):
        super().__init__()
        self.side = side
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.patch_embed = Embed(patch, dim)
        self.blocks = nn.ModuleList(Block(dim, heads, 4 * dim) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.head = nn.Linear(dim, num_classes)

    def forward(self, x):
        x = self.patch_embed(x)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)[:, 0])
