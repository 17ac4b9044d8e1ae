"""The suite `depthwise_conv`: CMT's local perception, and its reduction of keys behind a LayerNorm."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastvit_kernels import ops
from fastvit_kernels.bench import flops
from fastvit_kernels.bench.cases import Case
from fastvit_kernels.bench.suites.operators import OperatorModule, fuse


class Shape(NamedTuple):
    """A 3 x 3 filter beside a residual, or with a `ratio` one of that side and stride between two norms."""

    name: str
    channels: int
    grid: tuple[int, int]
    ratio: int = 0


class DepthwiseConv(OperatorModule):
    """A map to one of the same size, or to a smaller one."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        kernel, stride, padding = (shape.ratio, shape.ratio, 0) if shape.ratio else (3, 1, 1)
        channels = shape.channels
        self.norm = nn.LayerNorm(channels, eps=1e-6) if shape.ratio else None
        self.conv = nn.Conv2d(channels, channels, kernel, stride, padding, groups=channels)
        self.bn = nn.BatchNorm2d(channels) if shape.ratio else None
        self.shape = shape

    def forward(self, x: Tensor) -> Tensor:
        norm, bn = self.norm, self.bn
        return ops.depthwise_conv(
            x,
            self.conv.weight,
            self.conv.bias,
            grid=self.shape.grid,
            stride=self.conv.stride[0],
            padding=0 if self.shape.ratio else 1,
            norm_weight=None if norm is None else norm.weight,
            norm_bias=None if norm is None else norm.bias,
            norm_eps=None if norm is None else norm.eps,
            bn=None
            if bn is None
            else ops.BatchNorm(bn.weight, bn.bias, bn.running_mean, bn.running_var, bn.eps, bn.training),
            residual=None if self.shape.ratio else x,
            packed=self.packed,
            backend=self.backend,
        )


def case(shape: Shape, batch: int) -> Case:
    def inputs() -> tuple[Tensor, ...]:
        return (torch.randn(batch, flops.tokens(shape.grid), shape.channels),)

    def count() -> flops.Cost:
        with torch.device("meta"):
            return flops.counted(DepthwiseConv(shape).eval(), *inputs())

    return Case("depthwise_conv", shape.name, batch, count, lambda: DepthwiseConv(shape), inputs, fuse)
