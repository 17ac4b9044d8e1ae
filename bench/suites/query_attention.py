"""The suite `query_attention`: `global_attention` with few keys, the queries' norm and linear and its sum included."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastvit_kernels import ops
from fastvit_kernels.bench import flops
from fastvit_kernels.bench.cases import Case
from fastvit_kernels.bench.suites.hat_net import Stage
from fastvit_kernels.bench.suites.operators import OperatorModule, fuse


class QueryAttention(OperatorModule):
    """HAT-Net's second level: every pixel to the pooled map."""

    def __init__(self, stage: Stage) -> None:
        super().__init__()
        self.num_heads, self.scale = stage.num_heads, stage.head_dim**-0.5
        self.norm = nn.GroupNorm(1, stage.channels, eps=1e-6)
        self.q = nn.Linear(stage.channels, stage.channels)
        self.proj = nn.Linear(stage.channels, stage.channels)

    def forward(self, rows: Tensor, keys: Tensor, residual: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        return ops.global_attention(
            rows,
            keys,
            num_heads=self.num_heads,
            scale=self.scale,
            norm="group",
            norm_weight=self.norm.weight,
            norm_bias=self.norm.bias,
            norm_eps=self.norm.eps,
            query_weight=self.q.weight,
            query_bias=self.q.bias,
            add_query_input=True,
            proj_weight=self.proj.weight,
            proj_bias=self.proj.bias,
            residual=residual,
            packed=self.packed,
            backend=self.backend,
        )


def case(stage: Stage, batch: int) -> Case:
    def inputs() -> tuple[Tensor, ...]:
        return stage.rows(batch), torch.randn(batch, stage.keys, 2 * stage.channels), stage.rows(batch)

    cost = flops.query_attention(batch, stage.queries, stage.keys, stage.channels)
    return Case(
        "query_attention",
        stage.name,
        batch,
        cost,
        lambda: QueryAttention(stage),
        inputs,
        fuse,
        products=(1,),
        attention=True,
    )
