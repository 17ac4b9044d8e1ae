"""pooled_projection: the contract, its formula in plain PyTorch, and its messages."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fastvit_kernels.ops import pooled_projection
from fastvit_kernels.testing import inputs
from fastvit_kernels.testing.contract import Contract, Rejection
from fastvit_kernels.testing.numerics import assert_within_rule


def plain_pytorch(
    x,
    weight,
    bias,
    grid,
    kernel_size,
    ceil_mode,
    in_norm_weight=None,
    in_norm_bias=None,
    in_norm_eps=None,
    in_norm_statistics=None,
    norm_weight=None,
    norm_bias=None,
    norm_eps=None,
):
    maps = x.mT.unflatten(2, grid)
    if in_norm_eps is not None:
        if in_norm_statistics is None:
            maps = F.group_norm(maps, 1, in_norm_weight, in_norm_bias, in_norm_eps)
        else:
            mean, var = in_norm_statistics[:, :, None, None, None].unbind(1)
            maps = (maps - mean) / (var + in_norm_eps).sqrt()
            if in_norm_weight is not None:
                maps = maps * in_norm_weight[:, None, None] + in_norm_bias[:, None, None]
    maps = F.avg_pool2d(maps, kernel_size, ceil_mode=ceil_mode)
    if norm_eps is not None:
        maps = F.group_norm(maps, 1, norm_weight, norm_bias, norm_eps)
    return F.linear(maps.flatten(2).mT, weight, bias)


class TestPooledProjection(Contract, Rejection):
    cases = inputs.POOLED_PROJECTION
    fused = ("pooled_projection",)
    # The gradient of two statistics is a sum over everything that nearly cancels: its error is random.
    draws = 4
    equivalent = staticmethod(plain_pytorch)
    resizable = frozenset({("x", 0), ("x", 1)})
    reshaped = (
        [inputs.pooled_projection_case(f"batch_{n}", batch=n, statistics=False) for n in (2, 3, 5)],
        {"x": (0,)},
    )


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.zeros(2, 48)}, ValueError, r"x: expected 3 dimensions, got shape \(2, 48\)"),
        ({"grid": (6, 7)}, ValueError, "grid: 6 x 7 do not make the 48 tokens of x"),
        ({"grid": 7}, ValueError, r"grid: expected \(H, W\), got 7"),
        ({"kernel_size": 0}, ValueError, "kernel_size: expected an integer of at least 1, got 0"),
        ({"kernel_size": (2, 2)}, TypeError, "kernel_size: expected an integer, got tuple"),
        ({"ceil_mode": "no"}, TypeError, "ceil_mode: expected a bool, got str"),
        ({"kernel_size": 7}, ValueError, "grid: expected sides of at least kernel_size = 7, got 6 x 8"),
        ({"weight": torch.zeros(40, 23)}, ValueError, r"weight: expected shape \(40, 24\), got \(40, 23\)"),
        ({"bias": torch.zeros(41)}, ValueError, r"bias: expected shape \(40,\), got \(41,\)"),
        ({"in_norm_eps": None}, ValueError, "in_norm_eps: expected the norm's epsilon beside in_norm_weight, got None"),
        ({"norm_weight": torch.zeros(5)}, ValueError, r"norm_weight: expected shape \(24,\), got \(5,\)"),
        ({"norm_eps": -1.0}, ValueError, "norm_eps: expected a finite number in .*, got -1"),
        (
            {"in_norm_statistics": torch.zeros(2, 3)},
            ValueError,
            r"in_norm_statistics: expected float32 of shape \(2, 2\), got float32 of shape \(2, 3\)",
        ),
    ],
)
def test_bad_arguments(change, error, message):
    arguments = inputs.tagged(inputs.POOLED_PROJECTION, "smallest")[0].call().arguments
    with pytest.raises(error, match=message):
        pooled_projection(**{**arguments, **change})


def test_a_mean_far_from_zero():
    """A thousand standard deviations: the variance must not drown in the squares of the mean."""
    torch.manual_seed(0)
    x, weight = torch.randn(2, 64, 32) * 1e-2 + 10, torch.randn(48, 32)
    options = {"grid": (8, 8), "kernel_size": 4, "in_norm_eps": 1e-6, "norm_eps": 1e-6}
    found, low = (pooled_projection(x, weight, backend=backend, **options) for backend in ("cpu", "reference"))
    assert_within_rule(found, (pooled_projection(x.double(), weight.double(), **options), low))
