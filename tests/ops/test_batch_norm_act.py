"""batch_norm_act: the contract, its formula in plain PyTorch, its batch statistics and its messages."""

from __future__ import annotations

from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F

from fastvit_kernels.bench import step_memory
from fastvit_kernels.ops import BatchNorm, batch_norm_act
from fastvit_kernels.testing import inputs
from fastvit_kernels.testing.contract import Contract, Rejection

ACTIVATIONS = {
    None: lambda x: x,
    "gelu": F.gelu,
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "silu": F.silu,
    "relu": F.relu,
}


def plain_pytorch(x, bn, activation=None, bn_after_activation=False):
    act = ACTIVATIONS[activation]
    maps = act(x.mT) if bn_after_activation else x.mT
    maps = F.batch_norm(maps, bn.running_mean, bn.running_var, bn.weight, bn.bias, bn.training, 0.0, bn.eps)
    return (maps if bn_after_activation else act(maps)).mT


class TestBatchNormAct(Contract, Rejection):
    cases = inputs.BATCH_NORM_ACT
    fused = ("batch_norm_act",)
    precisions: ClassVar = {"cpu": (inputs.FP32, inputs.BF16, inputs.BF16_FP32)}
    equivalent = staticmethod(plain_pytorch)
    resizable = frozenset({("x", 0), ("x", 1)})
    reshaped = (
        [
            inputs.batch_norm_act_case("small", batch=2),
            inputs.batch_norm_act_case("other", batch=3, tokens=9),
            inputs.batch_norm_act_case("large", batch=5, tokens=40),
        ],
        {"x": (0, 1)},
    )


class TestTraining(Contract):
    draws = 3
    cases = inputs.BATCH_NORM_ACT_TRAINING
    fused = ("batch_norm_act",)
    precisions: ClassVar = TestBatchNormAct.precisions
    reshaped = TestBatchNormAct.reshaped
    equivalent = staticmethod(plain_pytorch)


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_statistics_of_the_kernels(activation, after):
    """Mean and variance of what the norm meets, also far from zero."""
    torch.manual_seed(0)
    x = torch.randn(3, 300, 21) + torch.linspace(0, 300, 21)
    ones, zeros = torch.ones(21), torch.zeros(21)
    static = activation or "none", after, 0.0, True, torch.float32
    mean, var = torch.ops.fastvit.batch_norm_act_statistics([x, ones, zeros, zeros, ones], *static)
    met = ACTIVATIONS[activation](x.double()) if after else x.double()
    exact_var, exact_mean = torch.var_mean(met, (0, 1), correction=0)
    torch.testing.assert_close(mean.double(), exact_mean, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(var.double(), exact_var, rtol=1e-5, atol=1e-6)


def test_running_statistics_are_those_of_batch_norm():
    bn, expected = torch.nn.BatchNorm1d(24).train(), torch.nn.BatchNorm1d(24).train()
    x = torch.randn(2, 35, 24)
    ours = BatchNorm(bn.weight, bn.bias, bn.running_mean, bn.running_var, bn.eps, True, bn.momentum)
    batch_norm_act(x, ours, activation="gelu", bn_after_activation=True)
    expected(F.gelu(x).mT)
    torch.testing.assert_close(bn.running_mean, expected.running_mean)
    torch.testing.assert_close(bn.running_var, expected.running_var)


def test_a_constant_gradient_leaves_nothing():
    """Behind batch statistics it has no effect on x, however far from zero the values are."""
    x = (torch.randn(4, 700, 24) + 1000.0).requires_grad_()
    out = batch_norm_act(x, BatchNorm(None, None, None, None, training=True), backend="cpu")
    out.backward(torch.full_like(out, 3.0))
    assert x.grad.abs().max() <= 1e-5
    assert abs(float(x.grad.double().sum())) <= 1e-3


def test_results_do_not_depend_on_the_number_of_threads():
    x, bn = torch.randn(3, 1111, 40, requires_grad=True), BatchNorm(None, None, None, None, training=True)
    found, threads = [], torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            out = batch_norm_act(x, bn, activation="gelu")
            found.append((out, *torch.autograd.grad(out.square().sum(), x)))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for others in found[1:] for a, b in zip(found[0], others, strict=True))


def test_x_alone_is_kept_for_the_gradients():
    x = torch.randn(2, 500, 48, requires_grad=True)
    bn = BatchNorm(torch.ones(48), torch.zeros(48), torch.zeros(48), torch.ones(48), training=True)
    kept = step_memory.saved(lambda: batch_norm_act(x, bn, activation="gelu", backend="cpu"), (x,))
    assert kept <= 4 * 48 * 4


def test_a_poisoned_value_stays_in_its_channel():
    x = torch.randn(2, 300, 24)
    x[1, 7, 5] = torch.nan
    for training in (False, True):
        bn = BatchNorm(None, None, torch.zeros(24), torch.ones(24), training=training)
        poisoned = batch_norm_act(x, bn, activation="relu").isnan()
        expected = torch.zeros_like(poisoned)
        expected[(slice(None), slice(None), 5) if training else (1, 7, 5)] = True
        assert torch.equal(poisoned, expected)


def test_training_on_one_value_per_channel_is_refused():
    running = torch.zeros(24), torch.ones(24)
    with pytest.raises(ValueError, match="x: expected more than 1 value per channel when training, got 1"):
        batch_norm_act(torch.zeros(1, 1, 24), BatchNorm(None, None, *running, training=True))
    assert not running[0].any() and bool((running[1] == 1).all())


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.zeros(35, 24)}, ValueError, r"x: expected 3 dimensions, got shape \(35, 24\)"),
        ({"x": torch.zeros(2, 35, 0)}, ValueError, "x: expected at least one channel"),
        ({"x": torch.zeros(2, 35, 24).int()}, TypeError, "x: expected one of float64, .* got int32"),
        ({"bn": None}, TypeError, "bn: expected a BatchNorm or None, got NoneType"),
        ({"bn": BatchNorm(None, None, None, None)}, ValueError, "bn: expected running statistics outside training"),
        (
            {"bn": BatchNorm(torch.ones(2), None, torch.ones(24), torch.ones(24))},
            ValueError,
            r"bn.weight: expected shape \(24,\), got \(2,\)",
        ),
        ({"activation": "tanh"}, ValueError, "activation: expected one of gelu, .* or None, got 'tanh'"),
        ({"bn_after_activation": 1}, TypeError, "bn_after_activation: expected a bool, got int"),
        ({"backend": "gpu"}, ValueError, "backend: unknown backend 'gpu'"),
    ],
)
def test_bad_arguments(change, error, message):
    arguments = inputs.tagged(inputs.BATCH_NORM_ACT, "smallest")[0].call().arguments
    with pytest.raises(error, match=message):
        batch_norm_act(**{**arguments, **change})
