"""The suite `depthwise_mlp`: norm, linear, depthwise convolution, linear and residual, as each family has them."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvit_kernels import ops
from fastvit_kernels.bench import flops
from fastvit_kernels.bench.cases import Case
from fastvit_kernels.bench.suites.operators import OperatorModule, fuse

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"gelu": F.gelu, "relu": F.relu, "silu": F.silu}


class Family(NamedTuple):
    """What all MLPs of a family of models have in common; see `fastvit_kernels.ops.depthwise_mlp`."""

    activation: str = "gelu"
    hidden_activation: str | None = None
    inner_residual: str | None = None
    norm: str | None = "layer"
    bias: bool = True
    batch_norm: bool = False
    bn_after_activation: bool = False
    out_norm: bool = False
    residual: bool = True
    num_prefix_tokens: int = 0
    return_mean: bool = False


PVT_V2 = Family()
PVT_V2_LINEAR = Family(hidden_activation="relu")
CMT = Family(hidden_activation="gelu", inner_residual="before_activation", batch_norm=True, bn_after_activation=True)
DHVT = Family(
    hidden_activation="gelu",
    inner_residual="after_activation",
    batch_norm=True,
    num_prefix_tokens=1,
    return_mean=True,
)
HAT_NET = Family("silu", "silu", norm="group", bias=False, out_norm=True)
EFFICIENTFORMER_V2 = Family(hidden_activation="gelu", norm=None, batch_norm=True, residual=False)


class Shape(NamedTuple):
    """The MLPs of one stage."""

    name: str
    family: Family
    grid: tuple[int, int]
    channels: int
    hidden: int
    kernel: int = 3


class DepthwiseMLP(OperatorModule):
    """In plain PyTorch, as users have it, until `fuse` switches it to the operator."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape, family = shape, shape.family
        channels, hidden, bias = shape.channels, shape.hidden, family.bias
        self.norm: nn.LayerNorm | nn.GroupNorm | None = None
        if family.norm is not None:
            layer = family.norm == "layer"
            self.norm = nn.LayerNorm(channels, eps=1e-6) if layer else nn.GroupNorm(1, channels, eps=1e-6)
        self.fc1 = nn.Linear(channels, hidden, bias)
        self.dw = nn.Conv2d(hidden, hidden, shape.kernel, padding=shape.kernel // 2, groups=hidden, bias=bias)
        self.fc2 = nn.Linear(hidden, channels, bias)
        widths = (hidden, hidden, channels) if family.batch_norm else ()
        self.bns = nn.ModuleList(nn.BatchNorm2d(width) for width in widths)
        self.out_norm = nn.GroupNorm(1, channels, eps=1e-6) if family.out_norm else None

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        return self._plain(x) if self.packed is None else self._fused(x)

    def _batch_norm(self, maps: Tensor, index: int) -> Tensor:
        out: Tensor = self.bns[index](maps) if self.shape.family.batch_norm else maps
        return out

    def _normed(self, rows: Tensor) -> Tensor:
        if self.norm is None:
            return rows
        out: Tensor = self.norm(rows) if self.shape.family.norm == "layer" else self.norm(rows.mT).mT
        return out

    def _plain(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        family, grid = self.shape.family, self.shape.grid
        rows = x[:, family.num_prefix_tokens :]
        hidden = self.fc1(self._normed(rows)).mT.unflatten(2, grid)
        act = _ACTIVATIONS[family.activation]
        if family.hidden_activation is not None and family.bn_after_activation:
            hidden = self._batch_norm(_ACTIVATIONS[family.hidden_activation](hidden), 0)
        elif family.hidden_activation is not None:
            hidden = _ACTIVATIONS[family.hidden_activation](self._batch_norm(hidden, 0))
        y = self.dw(hidden)
        if family.inner_residual == "before_activation":
            y = y + hidden
        y = self._batch_norm(act(y), 1) if family.bn_after_activation else act(self._batch_norm(y, 1))
        if family.inner_residual == "after_activation":
            y = y + hidden
        z = self.fc2(y.flatten(2).mT)
        if family.batch_norm:
            z = self._batch_norm(z.mT.unflatten(2, grid), 2).flatten(2).mT
        if self.out_norm is not None:
            z = self.out_norm(z.mT).mT
        out = rows + z if family.residual else z
        if family.num_prefix_tokens:
            out = torch.cat([x[:, : family.num_prefix_tokens], out], 1)
        return (out, z.mean(1)) if family.return_mean else out

    def _fused(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        family, norm, out_norm = self.shape.family, self.norm, self.out_norm
        bns = [
            ops.BatchNorm(bn.weight, bn.bias, bn.running_mean, bn.running_var, bn.eps, bn.training)
            for bn in self._norms()
        ]
        bn1, bn2, bn3 = bns or (None, None, None)
        return ops.depthwise_mlp(
            x,
            self.fc1.weight,
            self.fc1.bias,
            self.dw.weight,
            self.dw.bias,
            self.fc2.weight,
            self.fc2.bias,
            grid=self.shape.grid,
            activation=family.activation,
            hidden_activation=family.hidden_activation,
            inner_residual=family.inner_residual,
            norm=family.norm,
            norm_weight=None if norm is None else norm.weight,
            norm_bias=None if norm is None else norm.bias,
            norm_eps=None if norm is None else norm.eps,
            bn1=bn1,
            bn2=bn2,
            bn3=bn3,
            bn_after_activation=family.bn_after_activation,
            out_norm_weight=None if out_norm is None else out_norm.weight,
            out_norm_bias=None if out_norm is None else out_norm.bias,
            out_norm_eps=None if out_norm is None else out_norm.eps,
            residual=x if family.residual else None,
            num_prefix_tokens=family.num_prefix_tokens,
            return_mean=family.return_mean,
            packed=self.packed,
            backend=self.backend,
        )

    def _norms(self) -> list[nn.BatchNorm2d]:
        return [bn for bn in self.bns if isinstance(bn, nn.BatchNorm2d)]


def case(shape: Shape, batch: int) -> Case:
    def inputs() -> tuple[Tensor, ...]:
        return (torch.randn(batch, flops.tokens(shape.grid, shape.family.num_prefix_tokens), shape.channels),)

    def count() -> flops.Cost:
        with torch.device("meta"):
            return flops.counted(DepthwiseMLP(shape).eval(), *inputs())

    return Case("depthwise_mlp", shape.name, batch, count, lambda: DepthwiseMLP(shape), inputs, fuse)
