"""Operators whose residual is x itself: its gradient comes in one tensor, as if the residual were another one's."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from fastvit_kernels import ops
from fastvit_kernels.ops import BatchNorm
from fastvit_kernels.ops.operator import GradientKernels

CHANNELS = 19  # fills no vectors
GRID = (3, 5)
PIXELS = GRID[0] * GRID[1]

Call = Callable[[Tensor, Tensor], Tensor]


def parameter(*shape: int) -> Tensor:
    return torch.randn(shape) / 4


def local_perception(x: Tensor, residual: Tensor, norm: bool = False, bn: bool = False) -> Tensor:
    torch.manual_seed(1)
    norms = {"norm_weight": parameter(CHANNELS), "norm_bias": parameter(CHANNELS), "norm_eps": 1e-5} if norm else {}
    found = BatchNorm(parameter(CHANNELS), parameter(CHANNELS), None, None, training=True) if bn else None
    weight, bias = parameter(CHANNELS, 1, 3, 3), parameter(CHANNELS)
    return ops.depthwise_conv(x, weight, bias, grid=GRID, padding=1, bn=found, residual=residual, **norms)


def depthwise_mlp(x: Tensor, residual: Tensor, prefix: int = 0, training: bool = False, mean: bool = False) -> Tensor:
    torch.manual_seed(1)
    hidden, grid = 37, (3, 5) if prefix == 0 else (2, 7)
    widths = {"bn1": hidden, "bn2": hidden, "bn3": CHANNELS} if training else {}
    norms = {name: BatchNorm(parameter(n), parameter(n), None, None, training=True) for name, n in widths.items()}
    out = ops.depthwise_mlp(
        x,
        parameter(hidden, CHANNELS),
        parameter(hidden),
        parameter(hidden, 1, 3, 3),
        parameter(hidden),
        parameter(CHANNELS, hidden),
        parameter(CHANNELS),
        grid=grid,
        activation="gelu",
        norm="layer",
        norm_weight=parameter(CHANNELS),
        norm_bias=parameter(CHANNELS),
        norm_eps=1e-6,
        residual=residual,
        num_prefix_tokens=prefix,
        return_mean=mean,
        **norms,
    )
    return out if isinstance(out, Tensor) else out[0] + out[1].unsqueeze(1).square()


def with_statistics(x: Tensor, residual: Tensor) -> Tensor:
    """The second output depends on the residual, too: nothing may be left out."""
    torch.manual_seed(1)
    hidden = 24
    weights = parameter(hidden, CHANNELS), None, parameter(hidden, 1, 3, 3), None, parameter(CHANNELS, hidden), None
    out, statistics = ops.depthwise_mlp(
        x, *weights, grid=GRID, activation="silu", residual=residual, return_statistics=True
    )
    return out * (1 + statistics[:, 1].square()[:, None, None])


def global_attention(x: Tensor, residual: Tensor, query: bool = False, norm: str | None = None) -> Tensor:
    torch.manual_seed(1)
    options = {"query_weight": parameter(CHANNELS, CHANNELS)} if query else {}
    if norm is not None:
        options |= {
            "norm": norm,
            "norm_weight": parameter(CHANNELS),
            "norm_bias": parameter(CHANNELS),
            "norm_eps": 1e-5,
        }
    keys, values = (parameter(x.shape[0], 4, CHANNELS).to(x.dtype) for _ in range(2))
    out = ops.global_attention(x, keys, values, num_heads=1, scale=0.3, residual=residual, **options)
    assert isinstance(out, Tensor)
    return out


def pointwise_mlp(x: Tensor, residual: Tensor, hidden: int = 33) -> Tensor:
    torch.manual_seed(1)
    weights = parameter(hidden, CHANNELS), parameter(hidden), parameter(CHANNELS, hidden), parameter(CHANNELS)
    return ops.pointwise_mlp(x, *weights, activation="gelu", norm_eps=1e-5, residual=residual)


CALLS: dict[str, Call] = {
    "depthwise_conv": local_perception,
    "depthwise_conv with norms": partial(local_perception, norm=True, bn=True),
    "depthwise_mlp": depthwise_mlp,
    "depthwise_mlp behind a prefix": partial(depthwise_mlp, prefix=1),
    "depthwise_mlp of batch statistics": partial(depthwise_mlp, prefix=1, training=True, mean=True),
    "depthwise_mlp with statistics": with_statistics,
    "global_attention": global_attention,
    "global_attention with queries": partial(global_attention, query=True),
    "global_attention behind a LayerNorm": partial(global_attention, query=True, norm="layer"),
    "global_attention behind a GroupNorm": partial(global_attention, query=True, norm="group"),
    "pointwise_mlp": pointwise_mlp,
    "pointwise_mlp in slices": partial(pointwise_mlp, hidden=1100),
}


# A batch norm that trains wants values.
EMPTY = [(name, 0) for name in CALLS if name not in ("depthwise_conv with norms", "depthwise_mlp of batch statistics")]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("name", "batch"), [*((name, batch) for name in CALLS for batch in (1, 3)), *EMPTY])
def test_gradient_is_the_sum_of_both(name: str, batch: int, dtype: torch.dtype) -> None:
    call = CALLS[name]
    torch.manual_seed(0)
    x = torch.randn(batch, PIXELS, CHANNELS).to(dtype).requires_grad_()
    other = x.detach().clone().requires_grad_()
    result = call(x, x)
    grad = torch.randn_like(result)
    (own,) = torch.autograd.grad(result, x, grad)
    apart = torch.autograd.grad(call(x, other), (x, other), grad)
    assert own.dtype is dtype
    assert torch.equal(own, apart[0] + apart[1])


@pytest.mark.parametrize("name", CALLS)
def test_kernels_add_it_where_they_can(name: str) -> None:
    asked = []
    run = GradientKernels.run_backward

    def run_backward(self: GradientKernels, grads: Any, tensors: Any, needs: Any, static: Any) -> list[Tensor]:
        asked.append(len(needs) - len(tensors))
        return run(self, grads, tensors, needs, static)

    x = torch.randn(2, PIXELS, CHANNELS, requires_grad=True)
    with mock.patch.object(GradientKernels, "run_backward", run_backward):
        CALLS[name](x, x).sum().backward()
        CALLS[name](x, x.detach()).sum().backward()
    # Nothing is between x and an attention without queries of its own.
    assert asked == [int(name not in ("depthwise_mlp with statistics", "global_attention")), 0]


def test_only_the_residual_path_when_nothing_else_is_wanted() -> None:
    """Frozen weights change nothing: x's gradient still has both parts."""
    torch.manual_seed(0)
    x = torch.randn(2, PIXELS, CHANNELS, requires_grad=True)
    (gradient,) = torch.autograd.grad(local_perception(x, x).sum(), x)
    exact = x.detach().double().requires_grad_()
    torch.manual_seed(1)
    weight = parameter(CHANNELS, 1, 3, 3).double()
    maps = exact.mT.unflatten(2, GRID)
    out = maps + torch.nn.functional.conv2d(maps, weight, padding=1, groups=CHANNELS)
    (expected,) = torch.autograd.grad(out.sum(), exact)
    torch.testing.assert_close(gradient.double(), expected, rtol=1e-5, atol=1e-5)
