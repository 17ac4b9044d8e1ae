"""DropPath, QuickGELU and LayerNorm."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fastvit_kernels.nn import DropPath, LayerNorm, QuickGELU


def test_drop_path_drops_whole_samples_and_keeps_the_mean():
    torch.manual_seed(0)
    y = DropPath(0.3)(torch.ones(4000, 2, 3))
    samples = y.flatten(1)
    assert bool((samples == samples[:, :1]).all())
    assert sorted(set(samples[:, 0].tolist())) == [0.0, pytest.approx(1 / 0.7)]
    assert abs(float((samples[:, 0] == 0).double().mean()) - 0.3) < 0.03
    assert abs(float(y.mean()) - 1.0) < 0.04


def test_drop_path_without_scaling_keeps_values():
    torch.manual_seed(0)
    assert set(DropPath(0.3, scale_by_keep=False)(torch.ones(500)).tolist()) == {0.0, 1.0}


@pytest.mark.parametrize(("rate", "training"), [(0.0, True), (0.4, False)])
def test_drop_path_returns_its_input_when_idle(rate, training):
    x = torch.randn(3, 2)
    assert DropPath(rate).train(training)(x) is x


def test_drop_path_of_everything():
    assert not bool(DropPath(1.0)(torch.ones(8, 3)).any())


@pytest.mark.parametrize("rate", [-0.1, 1.5])
def test_drop_path_rates_are_probabilities(rate):
    with pytest.raises(ValueError, match=r"drop_prob: expected a probability in \[0, 1\]"):
        DropPath(rate)


def test_quick_gelu():
    x = torch.linspace(-6, 6, 101, dtype=torch.float64)
    torch.testing.assert_close(QuickGELU()(x), x / (1 + torch.exp(-1.702 * x)), rtol=1e-14, atol=0)
    assert float((QuickGELU()(x) - nn.GELU()(x)).abs().max()) > 1e-2


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_layer_norm_is_that_of_torch(dtype):
    torch.manual_seed(0)
    ours, plain = LayerNorm(12, eps=1e-3).to(dtype), nn.LayerNorm(12, eps=1e-3).to(dtype)
    nn.init.normal_(plain.weight), nn.init.normal_(plain.bias)
    ours.load_state_dict(plain.state_dict(), strict=True)
    x = torch.randn(2, 5, 12, dtype=dtype)
    assert torch.equal(ours(x), plain(x))


@pytest.mark.parametrize("parameters", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_layer_norm_is_computed_in_fp32(parameters):
    torch.manual_seed(0)
    norm = LayerNorm(64).to(parameters)
    x = (torch.randn(7, 64) + 8).bfloat16()
    wide = nn.functional.layer_norm(x.float(), (64,), norm.weight.float(), norm.bias.float(), norm.eps)
    assert norm(x).dtype == torch.bfloat16
    assert torch.equal(norm(x), wide.bfloat16())


def test_layer_norm_without_parameters():
    x = torch.randn(3, 6)
    assert torch.equal(LayerNorm(6, elementwise_affine=False)(x), nn.functional.layer_norm(x, (6,)))
    assert LayerNorm(6, bias=False).bias is None
