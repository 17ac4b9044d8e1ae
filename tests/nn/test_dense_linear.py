"""DenseLinear: nn.Linear, and one operator where it is prepared for inference."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fastvit_kernels import explain
from fastvit_kernels.nn import DenseLinear
from fastvit_kernels.testing.numerics import relative_l2


def made(bias=True, dtype=torch.float32):
    torch.manual_seed(0)
    linear, plain = DenseLinear(24, 77, bias=bias), nn.Linear(24, 77, bias=bias)
    plain.load_state_dict(linear.state_dict())
    return linear.to(dtype), plain.double()


@pytest.mark.parametrize("batch", [0, 1, 8, 20])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_prepared_for_inference_it_is_one_operator(batch, dtype, tolerance, bias):
    linear, plain = made(bias, dtype)
    linear.prepare_inference(True)
    # The first tokens of several: rows that do not follow each other.
    x = torch.randn(batch, 3, 24).to(dtype)[:, 0]
    with torch.no_grad():
        for _ in range(2):
            found, expected = linear(x), plain(x.double())
            assert found.dtype is dtype and found.shape == expected.shape
            assert not batch or relative_l2(found, expected) <= tolerance
            linear.weight.mul_(0.5)
            plain.weight.mul_(0.5)
    assert [decision.operator for decision in explain(linear, x).decisions] == ["patch_embedding"]


def test_elsewhere_it_is_the_linear():
    linear, plain = made(dtype=torch.float64)
    x = torch.randn(2, 24, dtype=torch.float64)
    assert torch.equal(linear(x), plain(x))
    linear.prepare_inference(True)
    rows = torch.randn(2, 3, 24, dtype=torch.float64)
    with torch.no_grad():
        assert torch.equal(linear(rows), plain(rows))
    linear(x).sum().backward()
    assert linear.weight.grad is not None
    with torch.no_grad():
        torch.testing.assert_close(linear(x), plain(x), rtol=1e-12, atol=1e-12)
