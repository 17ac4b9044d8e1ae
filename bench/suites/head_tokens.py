"""The suite `head_tokens`: what stands in front of DHVT's attention."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastvit_kernels import ops
from fastvit_kernels.bench import flops
from fastvit_kernels.bench.cases import Case
from fastvit_kernels.bench.suites.operators import OperatorModule, fuse


class Shape(NamedTuple):
    """Tokens, the class token among them, of so many channels for so many heads."""

    name: str
    tokens: int
    channels: int
    num_heads: int


class HeadTokens(OperatorModule):
    """The normalised tokens, and one more for each head."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        channels, width = shape.channels, shape.channels // shape.num_heads
        self.norm = nn.LayerNorm(channels, eps=1e-6)
        self.ht_proj = nn.Linear(width, channels)
        self.ht_norm = nn.LayerNorm(width)
        self.pos_embed = nn.Parameter(torch.zeros(shape.num_heads, channels))
        self.shape = shape

    def forward(self, x: Tensor) -> Tensor:
        return ops.head_tokens(
            x,
            self.ht_proj.weight,
            self.ht_proj.bias,
            self.pos_embed,
            num_heads=self.shape.num_heads,
            head_norm_eps=self.ht_norm.eps,
            head_norm_weight=self.ht_norm.weight,
            head_norm_bias=self.ht_norm.bias,
            norm_weight=self.norm.weight,
            norm_bias=self.norm.bias,
            norm_eps=self.norm.eps,
            packed=self.packed,
            backend=self.backend,
        )


def case(shape: Shape, batch: int) -> Case:
    def inputs() -> tuple[Tensor, ...]:
        return (torch.randn(batch, shape.tokens, shape.channels),)

    def count() -> flops.Cost:
        with torch.device("meta"):
            return flops.counted(HeadTokens(shape), *inputs())

    return Case("head_tokens", shape.name, batch, count, lambda: HeadTokens(shape), inputs, fuse)
