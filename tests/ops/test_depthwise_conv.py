"""depthwise_conv: the contract, its formula in plain PyTorch, its batch statistics and its messages."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fastvit_kernels.ops import BatchNorm, depthwise_conv
from fastvit_kernels.testing import inputs
from fastvit_kernels.testing.contract import Contract, Rejection


def plain_pytorch(
    x,
    weight,
    bias,
    grid,
    stride=1,
    padding=0,
    norm_weight=None,
    norm_bias=None,
    norm_eps=None,
    bn=None,
    residual=None,
):
    if norm_eps is not None:
        x = F.layer_norm(x, x.shape[-1:], norm_weight, norm_bias, norm_eps)
    maps = F.conv2d(x.mT.unflatten(2, grid), weight, bias, stride, padding, groups=len(weight))
    if bn is not None:
        maps = F.batch_norm(maps, bn.running_mean, bn.running_var, bn.weight, bn.bias, bn.training, 0.0, bn.eps)
    rows = maps.flatten(2).mT
    return rows if residual is None else residual + rows


class TestDepthwiseConv(Contract, Rejection):
    cases = inputs.DEPTHWISE_CONV
    fused = ("depthwise_conv",)
    equivalent = staticmethod(plain_pytorch)
    resizable = frozenset({("x", 0)})
    reshaped = (
        [
            inputs.depthwise_conv_case("small", batch=2),
            inputs.depthwise_conv_case("other", batch=3),
            inputs.depthwise_conv_case("large", batch=5),
        ],
        {"x": (0,)},
    )


class TestTraining(Contract):
    # In gradients of few numbers the errors of kernel and reference are independent.
    draws = 3
    cases = inputs.DEPTHWISE_CONV_TRAINING
    fused = ("depthwise_conv",)
    reshaped = TestDepthwiseConv.reshaped
    equivalent = staticmethod(plain_pytorch)


@pytest.mark.parametrize("k", range(1, 9))
@pytest.mark.parametrize("channels", [5, 16, 30])
def test_every_filter_on_maps_around_its_size(k, channels):
    """Both ways in which models use them: the map keeps its size, or shrinks by the filter's side."""
    torch.manual_seed(k)
    for height, width in ((k, k + 1), (k + 5, 2 * k + 3), (1, 9), (11, 2)):
        x, weight = torch.randn(2, height * width, channels), torch.randn(channels, 1, k, k)
        for stride, padding in ((1, k // 2), (k, 0)):
            if min(height, width) + 2 * padding < k:
                continue
            out = depthwise_conv(x, weight, None, grid=(height, width), stride=stride, padding=padding)
            exact = plain_pytorch(x.double(), weight.double(), None, (height, width), stride, padding)
            torch.testing.assert_close(out.double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("norm", [False, True])
def test_a_poisoned_pixel_reaches_its_neighbours_only(norm):
    x, weight = torch.zeros(1, 7 * 9, 20), torch.ones(20, 1, 3, 3)
    x[0, 3 * 9 + 4, 7] = torch.nan
    out = depthwise_conv(x, weight, None, grid=(7, 9), padding=1, norm_eps=1e-5 if norm else None, residual=x)
    expected = torch.zeros(1, 7, 9, 20, dtype=torch.bool)
    expected[0, 2:5, 3:6, slice(None) if norm else 7] = True
    expected[0, 3, 4, 7] = True
    assert torch.equal(out.isnan().view_as(expected), expected)


@pytest.mark.parametrize("padding", [1, 65])  # the latter is more than the kernels of the statistics take
def test_running_statistics_are_those_of_batch_norm(padding):
    bn, expected = torch.nn.BatchNorm2d(24).train(), torch.nn.BatchNorm2d(24).train()
    arguments = inputs.depthwise_conv_case("training", stride=2, padding=padding).call().arguments
    ours = BatchNorm(bn.weight, bn.bias, bn.running_mean, bn.running_var, bn.eps, True, bn.momentum)
    depthwise_conv(**{**arguments, "bn": ours})
    maps = arguments["x"].mT.unflatten(2, (5, 7))
    expected(F.conv2d(maps, arguments["weight"], arguments["bias"], 2, padding, groups=24))
    torch.testing.assert_close(bn.running_mean, expected.running_mean)
    torch.testing.assert_close(bn.running_var, expected.running_var)


@pytest.mark.parametrize("name", ["everything", "one_channel", "odder_channels"])
def test_statistics_of_the_kernels(name):
    """Mean and variance of a batch, with a LayerNorm in front and for channels that fill no vector."""
    case = next(case for case in inputs.DEPTHWISE_CONV if case.name == name)
    a = case.call().arguments
    tensors = [a.get(key) for key in ("x", "weight", "bias", "norm_weight", "norm_bias")] + [None] * 5
    options = a.get("norm_eps"), 0.0, True, *a["grid"], a["stride"], a["padding"], torch.float32
    mean, var = torch.ops.fastvit.depthwise_conv_statistics(tensors, *options)
    exact = [None if t is None else t.double() for t in tensors]
    arguments = {"stride": a["stride"], "padding": a["padding"], "norm_eps": a.get("norm_eps")}
    results = plain_pytorch(*exact[:3], a["grid"], norm_weight=exact[3], norm_bias=exact[4], **arguments)
    exact_var, exact_mean = torch.var_mean(results, (0, 1), correction=0)
    torch.testing.assert_close(mean.double(), exact_mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(var.double(), exact_var, rtol=1e-5, atol=1e-6)


def test_training_on_one_value_per_channel_is_refused():
    running = torch.zeros(24), torch.ones(24)
    bn = BatchNorm(None, None, *running, training=True)
    arguments = inputs.depthwise_conv_case("pixel", batch=1, grid=(1, 1)).call().arguments
    with pytest.raises(ValueError, match="x: expected more than 1 value per channel when training, got 1"):
        depthwise_conv(**{**arguments, "bn": bn})
    assert not running[0].any() and bool((running[1] == 1).all())


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.zeros(35, 24)}, ValueError, r"x: expected 3 dimensions, got shape \(35, 24\)"),
        ({"x": torch.zeros(2, 35, 0)}, ValueError, "x: expected at least one channel"),
        ({"grid": None}, ValueError, r"grid: expected \(H, W\) beside .* got None"),
        ({"grid": (5, 8)}, ValueError, "grid: 5 x 8 and 0 prefix tokens do not make the 35 tokens of x"),
        ({"weight": torch.zeros(24, 3, 3)}, ValueError, r"weight: expected \[C, 1, K, K\], got shape \(24, 3, 3\)"),
        ({"weight": torch.zeros(23, 1, 3, 3)}, ValueError, r"weight: expected shape \(24, 1, 3, 3\), got \(23, 1,"),
        ({"weight": torch.zeros(24, 1, 2, 3)}, ValueError, r"weight: expected shape \(24, 1, 3, 3\)"),
        ({"weight": torch.zeros(24, 1, 8, 8)}, ValueError, "weight: a 8 x 8 filter is larger than the padded 5 x 7"),
        ({"bias": torch.zeros(23)}, ValueError, r"bias: expected shape \(24,\), got \(23,\)"),
        ({"stride": 0}, ValueError, "stride: expected an integer of at least 1, got 0"),
        ({"stride": (2, 2)}, TypeError, "stride: expected an integer, got tuple"),
        ({"padding": -1}, ValueError, "padding: expected an integer of at least 0, got -1"),
        ({"padding": "same"}, TypeError, "padding: expected an integer, got str"),
        ({"norm_weight": torch.zeros(24)}, ValueError, "norm_eps: expected the LayerNorm's epsilon .* got None"),
        ({"norm_eps": 1e-5, "norm_bias": torch.zeros(2)}, ValueError, r"norm_bias: expected shape \(24,\), got \(2,\)"),
        ({"bn": torch.zeros(24)}, TypeError, "bn: expected a BatchNorm or None, got Tensor"),
        ({"bn": BatchNorm(None, None, None, None)}, ValueError, "bn: expected running statistics outside training"),
        (
            {"bn": BatchNorm(torch.ones(2), None, torch.ones(24), torch.ones(24))},
            ValueError,
            r"bn.weight: expected shape \(24,\), got \(2,\)",
        ),
        ({"residual": torch.zeros(2, 34, 24)}, ValueError, r"residual: expected shape \(2, 35, 24\)"),
        ({"stride": 2}, ValueError, r"residual: expected shape \(2, 12, 24\), got \(2, 35, 24\)"),
        ({"residual": torch.zeros(2, 35, 24).double()}, TypeError, "residual: float64 does not go with float32"),
        ({"backend": "gpu"}, ValueError, "backend: unknown backend 'gpu'"),
    ],
)
def test_bad_arguments(change, error, message):
    arguments = inputs.tagged(inputs.DEPTHWISE_CONV, "smallest")[0].call().arguments
    with pytest.raises(error, match=message):
        depthwise_conv(**{**arguments, **change})
