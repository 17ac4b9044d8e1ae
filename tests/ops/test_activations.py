"""The CPU kernels' activations, element by element: values, derivatives, and NaN."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fastvit_kernels.ops import pointwise_mlp

ACTIVATIONS = {"gelu": F.gelu, "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x)}
# Absolute errors of values and derivatives near one; those of bf16 come on top of what rounding takes.
TOLERANCES = {torch.float32: (4e-7, 1e-6), torch.bfloat16: (2e-4, 4e-4)}


def _activated(x, activation):
    """Between linears that change nothing."""
    one, zero = torch.ones(1, 1), torch.zeros(1)
    return pointwise_mlp(x[:, None], one, zero, one, zero, activation=activation, backend="cpu")[:, 0]


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_values_and_derivatives(activation, dtype):
    steps = torch.linspace(-8, 8, 40001)
    # Around 0.1875 and 0.1640625 lie the borders between pieces of tables.
    borders = torch.cat(
        [(torch.arange(-33, 33) + 0.5) * step + shift for step in (0.1875, 0.1640625) for shift in (0, 1e-6)]
    )
    x = torch.cat([steps, borders, torch.tensor([0.0, 1e-30, -1e-30, 1e-4, -1e-4, 50.0, -50.0])]).to(dtype)
    wanted_at = x.double().requires_grad_()
    wanted = ACTIVATIONS[activation](wanted_at)
    (wanted_slope,) = torch.autograd.grad(wanted.sum(), wanted_at)
    given_at = x.clone().requires_grad_()
    found = _activated(given_at, activation)
    (slope,) = torch.autograd.grad(found.sum(), given_at)
    rounding = 2.0 * torch.finfo(dtype).eps
    for given, right, most in zip((found, slope), (wanted, wanted_slope), TOLERANCES[dtype], strict=True):
        assert ((given.double() - right).abs() <= most + rounding * right.abs()).all()
    tiny = x.abs() < 1e-3
    assert torch.allclose(found[tiny].double(), wanted[tiny], rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=0)


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_nan_stays_one(activation, dtype):
    x = torch.tensor([float("nan"), 1.0], dtype=dtype, requires_grad=True)
    found = _activated(x, activation)
    (slope,) = torch.autograd.grad(found.sum(), x)
    assert found.isnan().tolist() == slope.isnan().tolist() == [True, False]
