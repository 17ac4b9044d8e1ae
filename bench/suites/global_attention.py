"""The suite `global_attention`: queries against the quarter as many keys, output projection and residual."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastvit_kernels import ops
from fastvit_kernels.bench import flops
from fastvit_kernels.bench.cases import Case
from fastvit_kernels.bench.suites.operators import OperatorModule, Stage, fuse


class GlobalAttention(OperatorModule):
    """CvT's attention behind the projections: its scale is that of the whole width, not of a head."""

    def __init__(self, stage: Stage) -> None:
        super().__init__()
        self.num_heads, self.scale = stage.num_heads, stage.channels**-0.5
        self.proj = nn.Linear(stage.channels, stage.channels)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, residual: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        return ops.global_attention(
            q,
            k,
            v,
            num_heads=self.num_heads,
            scale=self.scale,
            proj_weight=self.proj.weight,
            proj_bias=self.proj.bias,
            residual=residual,
            packed=self.packed,
            backend=self.backend,
        )


def case(stage: Stage, batch: int) -> Case:
    def inputs() -> tuple[Tensor, ...]:
        k, v = (torch.randn(batch, stage.keys, stage.channels) for _ in range(2))
        return stage.rows(batch), k, v, stage.rows(batch)

    cost = flops.global_attention(batch, stage.queries, stage.keys, stage.channels)
    return Case(
        "global_attention",
        stage.name,
        batch,
        lambda: cost,
        lambda: GlobalAttention(stage),
        inputs,
        fuse,
        products=(0, 1, 2),
        attention=True,
    )
