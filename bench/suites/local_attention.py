"""The suite `local_attention`: GroupNorm, q, k and v, attention in windows, residual, and the result's statistics."""

from __future__ import annotations

from torch import Tensor, nn

from fastvit_kernels import ops
from fastvit_kernels.bench import flops
from fastvit_kernels.bench.cases import Case
from fastvit_kernels.bench.suites.hat_net import Stage
from fastvit_kernels.bench.suites.operators import OperatorModule, fuse


class LocalAttention(OperatorModule):
    """HAT-Net's first level; in a stage of one level all of its attention, with the output projection."""

    def __init__(self, stage: Stage) -> None:
        super().__init__()
        self.stage = stage
        self.norm = nn.GroupNorm(1, stage.channels, eps=1e-6)
        self.qkv = nn.Linear(stage.channels, 3 * stage.channels)
        self.proj = nn.Linear(stage.channels, stage.channels) if stage.window == 1 else None

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        stage, proj = self.stage, self.proj
        return ops.local_attention(
            x,
            grid=stage.grid,
            window_size=window_size(stage),
            num_heads=stage.num_heads,
            scale=stage.head_dim**-0.5,
            norm="group",
            norm_weight=self.norm.weight,
            norm_bias=self.norm.bias,
            norm_eps=self.norm.eps,
            qkv_weight=self.qkv.weight,
            qkv_bias=self.qkv.bias,
            proj_weight=None if proj is None else proj.weight,
            proj_bias=None if proj is None else proj.bias,
            residual=x,
            return_statistics=True,
            packed=self.packed,
            backend=self.backend,
        )


def window_size(stage: Stage) -> int:
    """One level is one window."""
    return stage.window if stage.window > 1 else stage.grid[0]


def case(stage: Stage, batch: int) -> Case:
    cost = flops.local_attention(
        batch, stage.grid, stage.channels, window_size(stage), projection=stage.window == 1, statistics=True
    )
    return Case(
        "local_attention",
        stage.name,
        batch,
        lambda: cost,
        lambda: LocalAttention(stage),
        lambda: (stage.rows(batch),),
        fuse,
    )
