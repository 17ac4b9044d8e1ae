"""CvT in plain PyTorch, written from its equations: what our modules and models are compared with.

Parameter names are the official ones, so that weights move both ways. Nothing here uses the library under test.
"""

from __future__ import annotations

from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import nn


class QuickGELU(nn.Module):
    def forward(self, x):
        return x / (1 + torch.exp(-1.702 * x))


class LayerNorm(nn.LayerNorm):
    """fp32 inside, as the official code; fp64 stays fp64 so that exact comparisons are possible."""

    def forward(self, x):
        wide = x if x.dtype == torch.float64 else x.float()
        return super().forward(wide).to(x.dtype)


class Attention(nn.Module):
    def __init__(
        self,
        dim_in,
        dim_out,
        num_heads,
        qkv_bias=False,
        attn_drop=0.0,
        proj_drop=0.0,
        method="dw_bn",
        kernel_size=3,
        stride_kv=1,
        stride_q=1,
        padding_kv=1,
        padding_q=1,
        with_cls_token=True,
    ):
        super().__init__()
        self.num_heads, self.scale, self.with_cls_token = num_heads, dim_out**-0.5, with_cls_token
        strides = {"q": (stride_q, padding_q), "k": (stride_kv, padding_kv), "v": (stride_kv, padding_kv)}
        for name, (stride, padding) in strides.items():
            step = None
            if method == "dw_bn":
                conv = nn.Conv2d(dim_in, dim_in, kernel_size, stride, padding, groups=dim_in, bias=False)
                step = nn.Sequential(OrderedDict(conv=conv, bn=nn.BatchNorm2d(dim_in)))
            elif method == "avg" and name != "q":
                step = nn.AvgPool2d(kernel_size, stride, padding, ceil_mode=True)
            setattr(self, f"conv_proj_{name}", step)
        for name in strides:
            setattr(self, f"proj_{name}", nn.Linear(dim_in, dim_out, bias=qkv_bias))
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(dim_out, dim_out)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x, h, w):
        batch, _, channels = x.shape
        cls, tokens = (x[:, :1], x[:, 1:]) if self.with_cls_token else (x[:, :0], x)
        heads = []
        for name in "qkv":
            step = getattr(self, f"conv_proj_{name}")
            rows = tokens
            if step is not None:
                # Dense NCHW on both sides: the plainest memory there is.
                image = tokens.permute(0, 2, 1).reshape(batch, channels, h, w).contiguous()
                rows = step(image).contiguous().flatten(2).permute(0, 2, 1)
            rows = getattr(self, f"proj_{name}")(torch.cat([cls, rows], dim=1))
            heads.append(rows.reshape(batch, rows.shape[1], self.num_heads, self.proj.in_features // self.num_heads))
        q, k, v = heads
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * self.scale
        mixed = torch.einsum("bhqk,bkhd->bqhd", self.attn_drop(scores.softmax(dim=-1)), v)
        return self.proj_drop(self.proj(mixed.flatten(2)))


class Mlp(nn.Module):
    def __init__(self, in_features, hidden_features=None, out_features=None, act_layer=QuickGELU, drop=0.0):
        super().__init__()
        self.fc1 = nn.Linear(in_features, hidden_features or in_features)
        self.act = act_layer()
        self.fc2 = nn.Linear(hidden_features or in_features, out_features or in_features)
        self.drop = nn.Dropout(drop)

    def forward(self, x):
        return self.drop(self.fc2(self.drop(self.act(self.fc1(x)))))


class Block(nn.Module):
    def __init__(self, dim, num_heads, with_cls_token):
        super().__init__()
        self.norm1 = LayerNorm(dim)
        self.attn = Attention(dim, dim, num_heads, qkv_bias=True, stride_kv=2, with_cls_token=with_cls_token)
        self.norm2 = LayerNorm(dim)
        self.mlp = Mlp(dim, 4 * dim)

    def forward(self, x, h, w):
        x = x + self.attn(self.norm1(x), h, w)
        return x + self.mlp(self.norm2(x))


class Embed(nn.Module):
    def __init__(self, kernel, channels, dim, stride, padding):
        super().__init__()
        self.proj = nn.Conv2d(channels, dim, kernel, stride, padding)
        self.norm = LayerNorm(dim)

    def forward(self, x):
        x = self.proj(x)
        return self.norm(x.flatten(2).permute(0, 2, 1)), *x.shape[2:]


class Stage(nn.Module):
    def __init__(self, kernel, channels, dim, stride, padding, depth, num_heads, last):
        super().__init__()
        self.patch_embed = Embed(kernel, channels, dim, stride, padding)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim)) if last else None
        self.blocks = nn.ModuleList(Block(dim, num_heads, last) for _ in range(depth))

    def forward(self, x):
        x, h, w = self.patch_embed(x)
        cls = None
        if self.cls_token is not None:
            x = torch.cat([self.cls_token.repeat(x.shape[0], 1, 1), x], dim=1)
        for block in self.blocks:
            x = block(x, h, w)
        if self.cls_token is not None:
            cls, x = x[:, 0], x[:, 1:]
        return x.permute(0, 2, 1).reshape(x.shape[0], -1, h, w), cls


class CvT(nn.Module):
    """Without any dropout; `[B, num_classes]` also for one image."""

    def __init__(self, depths=(1, 2, 10), dims=(64, 192, 384), heads=(1, 3, 6), num_classes=1000):
        super().__init__()
        embed = ((7, 4, 2), (3, 2, 1), (3, 2, 1))
        for index, (kernel, stride, padding) in enumerate(embed):
            channels = dims[index - 1] if index else 3
            last = index == len(embed) - 1
            stage = Stage(kernel, channels, dims[index], stride, padding, depths[index], heads[index], last)
            self.add_module(f"stage{index}", stage)
        self.norm = LayerNorm(dims[-1])
        self.head = nn.Linear(dims[-1], num_classes)

    def forward(self, x):
        for index in range(3):
            x, cls = getattr(self, f"stage{index}")(x)
        return self.head(F.layer_norm(cls, cls.shape[-1:], self.norm.weight, self.norm.bias, self.norm.eps))


def randomize(model, seed=0):
    """Weights and statistics large enough for every layer to matter."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            fan_in = parameter[0].numel() if parameter.ndim > 1 else 1
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.add_((noise * (0.2 if fan_in == 1 else fan_in**-0.5)).to(parameter.dtype))
        for name, buffer in model.named_buffers():
            if buffer.is_floating_point():
                noise = torch.rand(buffer.shape, generator=generator, dtype=torch.float64)
                buffer.copy_(noise + 0.5 if name.endswith("var") else noise - 0.5)
    return model
