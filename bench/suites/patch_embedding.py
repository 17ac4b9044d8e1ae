"""The suite `patch_embedding`: the strided convolution in front of a stage and its LayerNorm."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastvit_kernels import ops
from fastvit_kernels.bench import flops
from fastvit_kernels.bench.cases import Case
from fastvit_kernels.bench.suites.operators import OperatorModule, Stage, fuse


class PatchEmbedding(OperatorModule):
    """An image, or the map of the stage before, to the map that the stage works on."""

    def __init__(self, stage: Stage) -> None:
        super().__init__()
        self.proj = nn.Conv2d(stage.in_channels, stage.channels, stage.kernel, stage.stride, stage.padding)
        self.norm = nn.LayerNorm(stage.channels)
        self.stage = stage

    def forward(self, x: Tensor) -> Tensor:
        return ops.patch_embedding(
            x,
            self.proj.weight,
            self.proj.bias,
            stride=self.stage.stride,
            padding=self.stage.padding,
            norm_weight=self.norm.weight,
            norm_bias=self.norm.bias,
            norm_eps=self.norm.eps,
            packed=self.packed,
            backend=self.backend,
        )


def case(stage: Stage, batch: int) -> Case:
    cost = flops.patch_embedding(
        batch,
        stage.in_channels,
        stage.channels,
        stage.in_grid,
        kernel=stage.kernel,
        stride=stage.stride,
        padding=stage.padding,
    )
    return Case(
        "patch_embedding",
        stage.name,
        batch,
        cost,
        lambda: PatchEmbedding(stage),
        lambda: (torch.randn(batch, stage.in_channels, *stage.in_grid),),
        fuse,
    )
