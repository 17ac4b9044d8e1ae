"""The suite `query_attention`: `global_attention` with the linear of the queries, and what else is fused around it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastvit_kernels import ops
from fastvit_kernels.bench import flops
from fastvit_kernels.bench.cases import Case
from fastvit_kernels.bench.suites.operators import OperatorModule, fuse


class Shape(NamedTuple):
    """The attention of one stage, behind whatever makes its keys; the defaults are PVTv2's.

    Attributes:
        queries, keys: rows of both.
        norm: of the query rows, fused: `"layer"`, `"group"` or None.
        add_query_input: the normalised query rows are added to the attention's result (HAT-Net).
        separate_values: keys and values in two tensors (CMT).
        table: added to the scores (CMT).
        residual: added to the result.
    """

    name: str
    queries: int
    keys: int
    channels: int
    num_heads: int
    norm: str | None = "layer"
    add_query_input: bool = False
    separate_values: bool = False
    table: bool = False
    residual: bool = True


class QueryAttention(OperatorModule):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape, channels = shape, shape.channels
        self.norm: nn.LayerNorm | nn.GroupNorm | None = None
        if shape.norm is not None:
            self.norm = nn.LayerNorm(channels, 1e-6) if shape.norm == "layer" else nn.GroupNorm(1, channels, 1e-6)
        self.q = nn.Linear(channels, channels)
        self.proj = nn.Linear(channels, channels)
        self.table = nn.Parameter(torch.empty(shape.num_heads, shape.queries, shape.keys)) if shape.table else None

    def forward(self, rows: Tensor, *others: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        shape, norm = self.shape, self.norm
        return ops.global_attention(
            rows,
            others[0],
            others[1] if shape.separate_values else None,
            num_heads=shape.num_heads,
            scale=(shape.channels // shape.num_heads) ** -0.5,
            norm=shape.norm,
            norm_weight=None if norm is None else norm.weight,
            norm_bias=None if norm is None else norm.bias,
            norm_eps=None if norm is None else norm.eps,
            query_weight=self.q.weight,
            query_bias=self.q.bias,
            add_query_input=shape.add_query_input,
            attn_bias=self.table,
            proj_weight=self.proj.weight,
            proj_bias=self.proj.bias,
            residual=others[-1] if shape.residual else None,
            packed=self.packed,
            backend=self.backend,
        )


def case(shape: Shape, batch: int) -> Case:
    def rows(count: int, width: int) -> Tensor:
        return torch.randn(batch, count, width)

    def inputs() -> tuple[Tensor, ...]:
        keys = [shape.channels] * 2 if shape.separate_values else [2 * shape.channels]
        residual = [rows(shape.queries, shape.channels)] if shape.residual else []
        return (rows(shape.queries, shape.channels), *(rows(shape.keys, width) for width in keys), *residual)

    def count() -> flops.Cost:
        with torch.device("meta"):
            return flops.counted(QueryAttention(shape), *inputs())

    return Case(
        "query_attention",
        shape.name,
        batch,
        count,
        lambda: QueryAttention(shape),
        inputs,
        fuse,
        settle=_settle,
        products=(1, 2) if shape.separate_values else (1,),
        attention=True,
    )


def _settle(module: nn.Module) -> None:
    """A table that counts beside the scores."""
    assert isinstance(module, QueryAttention)
    if module.table is not None:
        module.table.normal_()
