"""The suite `local_attention`: norm, q, k and v, attention in windows, residual, and what else is fused around it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastvit_kernels import ops
from fastvit_kernels.bench import flops
from fastvit_kernels.bench.cases import Case
from fastvit_kernels.bench.suites.operators import OperatorModule, fuse


class Shape(NamedTuple):
    """The windowed attention of one stage; the defaults are HAT-Net's.

    Attributes:
        window: side of a window.
        norm: `"group"`, or `"layer"` (Twins, Swin).
        projection: the output projection belongs to it.
        bias: added to the scores of every window (Swin).
        statistics: mean and variance of each sample of the result are returned for a GroupNorm behind it.
    """

    name: str
    grid: tuple[int, int]
    channels: int
    num_heads: int
    window: int
    norm: str = "group"
    projection: bool = False
    bias: bool = False
    statistics: bool = True


class LocalAttention(OperatorModule):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape, channels, area = shape, shape.channels, shape.window**2
        self.norm = nn.GroupNorm(1, channels, eps=1e-6) if shape.norm == "group" else nn.LayerNorm(channels, eps=1e-6)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.proj = nn.Linear(channels, channels) if shape.projection else None
        self.table = nn.Parameter(torch.empty(shape.num_heads, area, area)) if shape.bias else None

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        shape, proj = self.shape, self.proj
        return ops.local_attention(
            x,
            grid=shape.grid,
            window_size=shape.window,
            num_heads=shape.num_heads,
            scale=(shape.channels // shape.num_heads) ** -0.5,
            norm=shape.norm,
            norm_weight=self.norm.weight,
            norm_bias=self.norm.bias,
            norm_eps=self.norm.eps,
            qkv_weight=self.qkv.weight,
            qkv_bias=self.qkv.bias,
            attn_bias=self.table,
            proj_weight=None if proj is None else proj.weight,
            proj_bias=None if proj is None else proj.bias,
            residual=x,
            return_statistics=shape.statistics,
            packed=self.packed,
            backend=self.backend,
        )


def case(shape: Shape, batch: int) -> Case:
    cost = flops.local_attention(
        batch,
        shape.grid,
        shape.channels,
        shape.window,
        projection=shape.projection,
        table=shape.num_heads if shape.bias else 0,
        statistics=shape.statistics,
    )
    return Case(
        "local_attention",
        shape.name,
        batch,
        lambda: cost,
        lambda: LocalAttention(shape),
        lambda: (torch.randn(batch, flops.tokens(shape.grid), shape.channels),),
        fuse,
        settle=_settle,
    )


def _settle(module: nn.Module) -> None:
    """A bias that counts beside the scores."""
    assert isinstance(module, LocalAttention)
    if module.table is not None:
        module.table.normal_()
