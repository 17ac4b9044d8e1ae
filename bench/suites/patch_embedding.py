"""The suite `patch_embedding`: strided convolutions and the LayerNorm behind, with or without one in front."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastvit_kernels import ops
from fastvit_kernels.bench import flops
from fastvit_kernels.bench.cases import Case
from fastvit_kernels.bench.suites.operators import OperatorModule, fuse


class Shape(NamedTuple):
    """A patch embedding, or with `in_norm` the convolution that reduces keys and values."""

    name: str
    in_channels: int
    in_grid: tuple[int, int]
    kernel: int
    stride: int
    padding: int
    channels: int
    in_norm: bool = False


class PatchEmbedding(OperatorModule):
    """An image, or the map of the stage before, to the map that the stage works on."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.in_norm = nn.LayerNorm(shape.in_channels, eps=1e-6) if shape.in_norm else None
        self.proj = nn.Conv2d(shape.in_channels, shape.channels, shape.kernel, shape.stride, shape.padding)
        self.norm = nn.LayerNorm(shape.channels)
        self.shape = shape

    def forward(self, x: Tensor) -> Tensor:
        in_norm = self.in_norm
        return ops.patch_embedding(
            x,
            self.proj.weight,
            self.proj.bias,
            stride=self.shape.stride,
            padding=self.shape.padding,
            norm_weight=self.norm.weight,
            norm_bias=self.norm.bias,
            norm_eps=self.norm.eps,
            in_norm_weight=None if in_norm is None else in_norm.weight,
            in_norm_bias=None if in_norm is None else in_norm.bias,
            in_norm_eps=None if in_norm is None else in_norm.eps,
            packed=self.packed,
            backend=self.backend,
        )


def case(shape: Shape, batch: int) -> Case:
    def inputs() -> tuple[Tensor, ...]:
        return (torch.randn(batch, shape.in_channels, *shape.in_grid),)

    def count() -> flops.Cost:
        with torch.device("meta"):
            return flops.counted(PatchEmbedding(shape), *inputs())

    return Case("patch_embedding", shape.name, batch, count, lambda: PatchEmbedding(shape), inputs, fuse)
