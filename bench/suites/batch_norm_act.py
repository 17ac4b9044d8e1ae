"""The suite `batch_norm_act`: what stands behind the convolutions of CMT's and DHVT's stems."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastvit_kernels import ops
from fastvit_kernels.bench import flops
from fastvit_kernels.bench.cases import Case
from fastvit_kernels.bench.suites.operators import OperatorModule, fuse
from fastvit_kernels.nn.dense_conv import of_pixels


class Shape(NamedTuple):
    """A map behind a convolution; GELU stands in front of the batch norm or behind it."""

    name: str
    channels: int
    grid: tuple[int, int]
    bn_after_activation: bool


SHAPES = (
    Shape("cmt_xs_stem", 16, (96, 96), True),
    Shape("cmt_s_stem", 32, (112, 112), True),
    Shape("dhvt_tiny_stem_1", 24, (112, 112), False),
    Shape("dhvt_tiny_stem_2", 48, (56, 56), False),
    Shape("dhvt_tiny_stem_3", 96, (28, 28), False),
    Shape("dhvt_small_stem_1", 48, (112, 112), False),
)


class BatchNormAct(OperatorModule):
    """PyTorch's two modules, or the operator in their place."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(shape.channels)
        self.after = shape.bn_after_activation
        self.act = nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        bn = self.bn
        if self.backend == "reference":
            out: Tensor = bn(self.act(x)) if self.after else self.act(bn(x))
            return out
        norm = ops.BatchNorm(bn.weight, bn.bias, bn.running_mean, bn.running_var, bn.eps, bn.training)
        return of_pixels(x, norm, activation="gelu", bn_after_activation=self.after, backend=self.backend)


def case(shape: Shape, batch: int) -> Case:
    def inputs() -> tuple[Tensor, ...]:
        return (torch.randn(batch, shape.channels, *shape.grid),)

    def count() -> flops.Cost:
        with torch.device("meta"):
            return flops.counted(BatchNormAct(shape).eval(), *inputs())

    return Case("batch_norm_act", shape.name, batch, count, lambda: BatchNormAct(shape), inputs, fuse, products=(0,))
