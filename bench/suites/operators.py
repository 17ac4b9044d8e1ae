"""What the operator suites share: stages of the published models and modules that hold an operator's weights."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastvit_kernels.bench import flops
from fastvit_kernels.ops.packing import PackedWeights


class Stage(NamedTuple):
    """The patch embedding in front of a stage, and the shape all its blocks share.

    Attributes:
        in_channels, in_grid: of the image, or of the stage before.
        kernel, stride, padding: of the patch embedding.
        grid: what that makes of `in_grid`.
    """

    name: str
    in_channels: int
    in_grid: tuple[int, int]
    kernel: int
    stride: int
    padding: int
    channels: int
    num_heads: int
    num_prefix_tokens: int

    @property
    def grid(self) -> tuple[int, int]:
        return flops.output_grid(self.in_grid, self.kernel, self.stride, self.padding)

    @property
    def queries(self) -> int:
        return flops.tokens(self.grid, self.num_prefix_tokens)

    @property
    def keys(self) -> int:
        return flops.tokens(flops.output_grid(self.grid, 3, 2, 1), self.num_prefix_tokens)

    def rows(self, batch: int) -> Tensor:
        return torch.randn(batch, self.queries, self.channels)


class OperatorModule(nn.Module):
    """Weights of one operator call; on the reference until `fuse` switches it."""

    def __init__(self) -> None:
        super().__init__()
        self.backend: str | None = "reference"
        self.packed: PackedWeights | None = None


def fuse(module: nn.Module) -> nn.Module:
    """Run on the preferred backend, weights packed once."""
    assert isinstance(module, OperatorModule)
    module.backend, module.packed = None, PackedWeights()
    return module
