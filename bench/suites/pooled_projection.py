"""The suite `pooled_projection`: HAT-Net's pooled keys and values."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastvit_kernels import ops
from fastvit_kernels.bench import flops
from fastvit_kernels.bench.cases import Case
from fastvit_kernels.bench.suites.operators import OperatorModule, fuse


class Shape(NamedTuple):
    """A map that is averaged over squares with sides of `kernel_size`, and made keys and values of."""

    name: str
    channels: int
    grid: tuple[int, int]
    kernel_size: int


class PooledProjection(OperatorModule):
    """A norm by the map's own statistics, averages, their norm, a linear to twice the channels."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.grid_norm = nn.GroupNorm(1, shape.channels, eps=1e-6)
        self.ds_norm = nn.GroupNorm(1, shape.channels, eps=1e-6)
        self.kv = nn.Linear(shape.channels, 2 * shape.channels)
        self.shape = shape

    def forward(self, x: Tensor) -> Tensor:
        in_norm, norm = self.grid_norm, self.ds_norm
        return ops.pooled_projection(
            x,
            self.kv.weight,
            self.kv.bias,
            grid=self.shape.grid,
            kernel_size=self.shape.kernel_size,
            in_norm_weight=in_norm.weight,
            in_norm_bias=in_norm.bias,
            in_norm_eps=in_norm.eps,
            norm_weight=norm.weight,
            norm_bias=norm.bias,
            norm_eps=norm.eps,
            packed=self.packed,
            backend=self.backend,
        )


def case(shape: Shape, batch: int) -> Case:
    def inputs() -> tuple[Tensor, ...]:
        return (torch.randn(batch, flops.tokens(shape.grid), shape.channels),)

    def count() -> flops.Cost:
        with torch.device("meta"):
            return flops.counted(PooledProjection(shape), *inputs())

    return Case("pooled_projection", shape.name, batch, count, lambda: PooledProjection(shape), inputs, fuse)
