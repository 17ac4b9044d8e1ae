"""PointwiseMLP against the transformer MLP in plain PyTorch."""

from __future__ import annotations

import copy
import pickle

import plain_cvt
import pytest
import torch
from torch import nn

from fastvit_kernels.nn import LayerNorm, PointwiseMLP, QuickGELU
from fastvit_kernels.testing import assert_within_rule, relative_l2

ACTIVATIONS = {
    "quick gelu": (QuickGELU, plain_cvt.QuickGELU),
    "gelu": (nn.GELU, nn.GELU),
    "tanh gelu": (lambda: nn.GELU(approximate="tanh"), lambda: nn.GELU(approximate="tanh")),
    "relu": (nn.ReLU, nn.ReLU),
}
FUSED = ("quick gelu", "gelu")


def make(activation="quick gelu", dtype=torch.float64, **arguments):
    arguments = {"in_features": 12, "hidden_features": 40, **arguments}
    ours_act, plain_act = ACTIVATIONS[activation]
    plain = plain_cvt.randomize(plain_cvt.Mlp(act_layer=plain_act, **arguments)).to(dtype)
    ours = PointwiseMLP(act_layer=ours_act, **arguments).to(dtype)
    ours.load_state_dict(plain.state_dict(), strict=True)
    return ours, plain


def rows(*shape, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(*shape, 12, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_equals_the_original_with_all_gradients(activation):
    ours, plain = make(activation)
    assert bool(ours.fusion_obstacles()) == (activation not in FUSED)
    norm = plain_cvt.randomize(LayerNorm(12, eps=1e-3).double())
    x = rows(3, 17)
    y = ours(x, norm=norm, residual=x)
    expected = x + plain(nn.functional.layer_norm(x, (12,), norm.weight, norm.bias, norm.eps))
    assert relative_l2(y, expected) <= 1e-14
    assert relative_l2(ours(x), plain(x)) <= 1e-14
    g = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).reshape(y.shape)
    found = torch.autograd.grad(y, (x, *norm.parameters(), *ours.parameters()), g)
    wanted = torch.autograd.grad(expected, (x, *norm.parameters(), *plain.parameters()), g)
    for a, b in zip(found, wanted, strict=True):
        assert relative_l2(a, b) <= 1e-13


@pytest.mark.parametrize("activation", FUSED)
def test_the_cpu_kernels_keep_the_numerics_rule(activation):
    ours, _ = make(activation, dtype=torch.float32)
    exact, low = copy.deepcopy(ours).double(), copy.deepcopy(ours)
    ours.backend, low.backend = "cpu", "reference"
    norm = LayerNorm(12)
    x = rows(2, 33, dtype=torch.float32)
    with torch.no_grad():
        y64 = exact(x.double(), norm=copy.deepcopy(norm).double(), residual=x.double())
        assert_within_rule(ours(x, norm=norm, residual=x), (y64, low(x, norm=norm, residual=x)))


def test_widths_default_to_the_input():
    assert [(layer.in_features, layer.out_features) for layer in (PointwiseMLP(12).fc1, PointwiseMLP(12).fc2)] == [
        (12, 12),
        (12, 12),
    ]
    ours, plain = make(out_features=7)
    x = rows(5)
    assert relative_l2(ours(x), plain(x)) <= 1e-14
    assert ours(x).shape == (5, 7)


def test_state_dicts_load_strictly_both_ways():
    ours, plain = make()
    assert list(ours.state_dict()) == list(plain.state_dict())
    plain_cvt.randomize(ours, seed=5)
    plain.load_state_dict(ours.state_dict(), strict=True)
    assert all(torch.equal(value, ours.state_dict()[name]) for name, value in plain.state_dict().items())


def test_initialisation_is_that_of_the_layers():
    torch.manual_seed(3)
    ours = PointwiseMLP(12, 40)
    torch.manual_seed(3)
    plain = plain_cvt.Mlp(12, 40)
    assert all(torch.equal(value, ours.state_dict()[name]) for name, value in plain.state_dict().items())


def test_dropout_behind_both_linears():
    ours, _ = make(drop=0.5)
    assert ours.fusion_obstacles() == ["hidden dropout is active"]
    with torch.no_grad():
        ours.fc1.weight.zero_(), ours.fc1.bias.fill_(30.0)
        ours.fc2.weight.fill_(1 / 40), ours.fc2.bias.zero_()
        torch.manual_seed(0)
        x = rows(500, 10)
        y = ours(x, residual=torch.full_like(x, 1.0)) - 1.0
        kept = y != 0
        assert abs(float(kept.double().mean()) - 0.5) < 0.02
        # 30, doubled behind the first dropout for half of 40 hidden values, doubled again where it survives.
        assert abs(float(y.mean()) - 30.0) < 0.5
        spread = float(y[kept].reshape(-1).std())
        assert abs(spread - 2 * 60 * (0.25 / 40) ** 0.5) < 0.5
    assert ours.eval().fusion_obstacles() == []


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies_keep_everything_but_the_packed_weights(copier):
    ours, plain = make(dtype=torch.float32)
    ours.prepare_inference(True)
    ours.backend = "cpu"
    x = rows(2, 9, dtype=torch.float32)
    with torch.no_grad():
        expected = ours(x)
        twin = copier(ours)
        assert ours._packed["pointwise_mlp"].nbytes > 0 and twin._packed["pointwise_mlp"].nbytes == 0
        assert torch.equal(twin(x), expected)
    assert list(ours.state_dict()) == list(plain.state_dict())
    ours.prepare_inference(False)
    assert ours._packed is None


@pytest.mark.parametrize("shape", [(), (0,), (1, 1), (2, 0, 3), (2, 3, 5)], ids=str)
def test_any_number_of_leading_axes(shape):
    ours, plain = make()
    x = rows(*shape)
    assert ours(x, residual=x).shape == x.shape
    assert relative_l2(ours(x), plain(x)) <= 1e-14


def test_a_wrong_width_names_the_argument():
    ours, _ = make()
    with pytest.raises(ValueError, match=r"x: expected \[..., 12\], got shape \(2, 11\)"):
        ours(torch.zeros(2, 11, dtype=torch.float64))
