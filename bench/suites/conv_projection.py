"""The suite `conv_projection`: LayerNorm, depthwise convolutions, batch norms and linears of q, k and v."""

from __future__ import annotations

from torch import Tensor, nn

from fastvit_kernels import ops
from fastvit_kernels.bench import flops
from fastvit_kernels.bench.cases import Case
from fastvit_kernels.bench.suites.operators import OperatorModule, Stage, fuse


class ConvProjection(OperatorModule):
    """Three branches of a 3 x 3 depthwise convolution; q keeps the grid, k and v halve it."""

    def __init__(self, stage: Stage) -> None:
        super().__init__()
        self.stage = stage
        channels = stage.channels
        self.norm = nn.LayerNorm(channels)
        self.convs = nn.ModuleList(
            nn.Conv2d(channels, channels, 3, stride, 1, groups=channels, bias=False) for stride in (1, 2, 2)
        )
        self.bns = nn.ModuleList(nn.BatchNorm2d(channels) for _ in range(3))
        self.linears = nn.ModuleList(nn.Linear(channels, channels) for _ in range(3))

    def _branch(self, index: int) -> ops.Projection:
        conv, bn, linear = self.convs[index], self.bns[index], self.linears[index]
        assert isinstance(conv, nn.Conv2d) and isinstance(bn, nn.BatchNorm2d) and isinstance(linear, nn.Linear)
        norm = ops.BatchNorm(bn.weight, bn.bias, bn.running_mean, bn.running_var, bn.eps, bn.training)
        return ops.Projection(conv.weight, linear.weight, linear.bias, norm, conv.stride[0], 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return ops.conv_projection(
            x,
            *(self._branch(index) for index in range(3)),
            grid=self.stage.grid,
            norm_weight=self.norm.weight,
            norm_bias=self.norm.bias,
            norm_eps=self.norm.eps,
            num_prefix_tokens=self.stage.num_prefix_tokens,
            packed=self.packed,
            backend=self.backend,
        )


def case(stage: Stage, batch: int) -> Case:
    cost = flops.conv_projection(batch, stage.channels, stage.grid, num_prefix_tokens=stage.num_prefix_tokens)
    return Case(
        "conv_projection",
        stage.name,
        batch,
        lambda: cost,
        lambda: ConvProjection(stage),
        lambda: (stage.rows(batch),),
        fuse,
    )
