"""The suite `pointwise_mlp`: LayerNorm, linear, QuickGELU, linear, residual."""

from __future__ import annotations

from torch import Tensor, nn

from fastvit_kernels import ops
from fastvit_kernels.bench import flops
from fastvit_kernels.bench.cases import Case
from fastvit_kernels.bench.suites.operators import OperatorModule, Stage, fuse

RATIO = 4


class PointwiseMLP(OperatorModule):
    def __init__(self, stage: Stage) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(stage.channels)
        self.fc1 = nn.Linear(stage.channels, RATIO * stage.channels)
        self.fc2 = nn.Linear(RATIO * stage.channels, stage.channels)

    def forward(self, x: Tensor) -> Tensor:
        return ops.pointwise_mlp(
            x,
            self.fc1.weight,
            self.fc1.bias,
            self.fc2.weight,
            self.fc2.bias,
            activation="quick_gelu",
            norm_weight=self.norm.weight,
            norm_bias=self.norm.bias,
            norm_eps=self.norm.eps,
            residual=x,
            packed=self.packed,
            backend=self.backend,
        )


def case(stage: Stage, batch: int) -> Case:
    cost = flops.pointwise_mlp(batch * stage.queries, stage.channels, RATIO * stage.channels)
    return Case(
        "pointwise_mlp",
        stage.name,
        batch,
        lambda: cost,
        lambda: PointwiseMLP(stage),
        lambda: (stage.rows(batch),),
        fuse,
    )
