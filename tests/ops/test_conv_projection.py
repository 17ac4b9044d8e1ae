"""conv_projection: the contract, its formula in plain PyTorch, its batch statistics and its messages."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastvit_kernels import BackendError, use_backend
from fastvit_kernels.ops import conv_projection
from fastvit_kernels.testing import inputs, relative_l2
from fastvit_kernels.testing.contract import Contract, Rejection


def plain_pytorch(
    x, query, key, value, grid=None, num_prefix_tokens=0, norm_weight=None, norm_bias=None, norm_eps=None
):
    if x.ndim == 4:
        grid = x.shape[2:]
        x = x.flatten(2).mT
    u = x if norm_eps is None else F.layer_norm(x, x.shape[-1:], norm_weight, norm_bias, norm_eps)
    prefix, tokens = u[:, :num_prefix_tokens], u[:, num_prefix_tokens:]
    outputs = []
    for s in (query, key, value):
        maps = tokens.mT.unflatten(2, grid)
        maps = F.conv2d(maps, s.conv_weight, None, s.stride, s.padding, groups=x.shape[-1])
        if s.bn is not None:
            statistics = (s.bn.running_mean, s.bn.running_var)
            if s.bn.training:
                statistics = (None, None)
            if maps.shape[0]:
                maps = F.batch_norm(maps, *statistics, s.bn.weight, s.bn.bias, s.bn.training, 0.0, s.bn.eps)
        outputs.append(F.linear(torch.cat([prefix, maps.flatten(2).mT], 1), s.weight, s.bias))
    return tuple(outputs)


def _sized(name, batch, grid):
    return inputs.conv_projection_case(name, batch=batch, grid=grid, channels=8, as_map=torch.channels_last)


class TestConvProjection(Contract, Rejection):
    # In gradients of few numbers the errors of kernel and reference are independent.
    draws = 3
    cases = inputs.CONV_PROJECTION
    fused = ("conv_projection",)
    resizable = frozenset({("x", 0)} | {(f"{name}.weight", 0) for name in ("query", "key", "value")})
    equivalent = staticmethod(plain_pytorch)
    reshaped = (
        [_sized("small", 2, (5, 7)), _sized("other", 3, (6, 4)), _sized("large", 5, (9, 8))],
        {"x": (0, 2, 3)},
    )


def _training(**options):
    return inputs.conv_projection_case("training", prefix=1, bn_training=True, **options).call()


def test_running_statistics_are_those_of_batch_norm():
    """Three steps, each with its own momentum, on the kernels and with autograd off and on."""
    call = _training()
    plain = {name: nn.BatchNorm2d(24, dtype=torch.float64) for name in ("query", "key", "value")}
    for name, bn in plain.items():
        bn.running_mean.copy_(call.arguments[name].bn.running_mean)
        bn.running_var.copy_(call.arguments[name].bn.running_var)
    for step, momentum in enumerate((0.1, 0.5, 1.0)):
        x = torch.randn(2, 36, 24, generator=torch.Generator().manual_seed(step)) * 2 + 1
        branches = {n: call.arguments[n]._replace(bn=call.arguments[n].bn._replace(momentum=momentum)) for n in plain}
        with torch.set_grad_enabled(step != 1), use_backend("cpu"):
            conv_projection(**call.arguments | branches | {"x": x})
        u = F.layer_norm(x.double(), (24,), *(call.arguments[f"norm_{n}"].double() for n in ("weight", "bias")), 1e-5)
        for name, bn in plain.items():
            bn.momentum = momentum
            s = branches[name]
            bn(F.conv2d(u[:, 1:].mT.unflatten(2, (5, 7)), s.conv_weight.double(), None, s.stride, 1, groups=24))
            assert relative_l2(s.bn.running_mean, bn.running_mean) < 1e-6
            assert relative_l2(s.bn.running_var, bn.running_var) < 1e-6


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_a_refused_training_call_leaves_the_statistics(backend):
    call = _training(batch=1, grid=(2, 2), stride=(1, 1, 2))
    before = {name: t.clone() for name, t in call.buffers().items()}
    with (
        pytest.raises(ValueError, match="x: expected more than 1 value per channel when training, got 1"),
        use_backend(backend),
    ):
        call()
    call.arguments["value"] = call.arguments["value"]._replace(stride=1)
    with pytest.raises(BackendError), use_backend("cuda"):
        call()
    for name, t in call.buffers().items():
        assert torch.equal(t, before[name])


def test_evaluation_leaves_the_statistics():
    call = inputs.conv_projection_case("evaluation").call()
    before = {name: t.clone() for name, t in call.buffers().items()}
    call()
    for name, t in call.buffers().items():
        assert torch.equal(t, before[name])


def _branch(**changes):
    return lambda arguments: {"key": arguments["key"]._replace(**changes)}


def _bn(**changes):
    return lambda arguments: {"key": arguments["key"]._replace(bn=arguments["key"].bn._replace(**changes))}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"grid": None}, ValueError, r"grid: expected \(H, W\) beside \[B, P \+ H\*W, C\] tokens, got None"),
        ({"grid": 35}, ValueError, r"grid: expected \(H, W\) .* got 35"),
        ({"grid": (5, 7, 1)}, ValueError, r"grid: expected \(H, W\) .* got \(5, 7, 1\)"),
        ({"grid": (5.0, 7)}, TypeError, "grid: expected an integer, got float"),
        ({"grid": (-5, -7)}, ValueError, "grid: expected an integer of at least 1, got -5"),
        ({"grid": (7, 7)}, ValueError, "grid: 7 x 7 and 1 prefix tokens do not make the 36 tokens of x"),
        ({"num_prefix_tokens": -1}, ValueError, "num_prefix_tokens: expected an integer of at least 0, got -1"),
        ({"num_prefix_tokens": 1.0}, TypeError, "num_prefix_tokens: expected an integer, got float"),
        ({"num_prefix_tokens": True}, TypeError, "num_prefix_tokens: expected an integer, got bool"),
        ({"num_prefix_tokens": 2}, ValueError, "grid: 5 x 7 and 2 prefix tokens do not make the 36 tokens of x"),
        (
            {"x": torch.zeros(2, 16, 5, 7)},
            ValueError,
            r"num_prefix_tokens: expected 0 beside a \[B, C, H, W\] map, got 1",
        ),
        (
            {"x": torch.zeros(2, 16, 5, 7), "num_prefix_tokens": 0, "grid": (7, 5)},
            ValueError,
            r"grid: expected \(5, 7\) from x's shape, got \(7, 5\)",
        ),
        (
            {"x": torch.zeros(36, 16)},
            ValueError,
            r"x: expected \[B, P \+ H\*W, C\] tokens or a .* map, got shape \(36, 16\)",
        ),
        ({"x": torch.zeros(2, 36, 0)}, ValueError, "x: expected at least one channel"),
        ({"x": torch.zeros(2, 36, 16).to_sparse()}, TypeError, "x: expected a strided tensor, got torch.sparse_coo"),
        ({"norm_eps": None}, ValueError, "norm_eps: expected the LayerNorm's epsilon .* got None"),
        ({"norm_eps": -1e-5}, ValueError, "norm_eps: expected a finite number in .*, got -1e-05"),
        ({"norm_eps": float("nan")}, ValueError, "norm_eps: expected a finite number in .*, got nan"),
        ({"norm_eps": "1e-5"}, TypeError, "norm_eps: expected a number, got str"),
        ({"key": None}, TypeError, "key: expected a Projection, got NoneType"),
        ({"key": ()}, TypeError, "key: expected a Projection, got tuple"),
        (_branch(stride=0), ValueError, "key.stride: expected an integer of at least 1, got 0"),
        (_branch(stride=(2, 2)), TypeError, "key.stride: expected an integer, got tuple"),
        (_branch(padding=-1), ValueError, "key.padding: expected an integer of at least 0, got -1"),
        (_branch(padding="same"), TypeError, "key.padding: expected an integer, got str"),
        (
            _branch(conv_weight=torch.zeros(16, 1, 3, 5)),
            ValueError,
            r"key.conv_weight: expected shape \(16, 1, 5, 5\), got \(16, 1, 3, 5\)",
        ),
        (_branch(conv_weight=torch.zeros(16, 9)), ValueError, r"key.conv_weight: expected \[C, 1, K, K\], got shape"),
        (
            _branch(conv_weight=torch.zeros(16, 1, 0, 0)),
            ValueError,
            r"key.conv_weight: expected \[C, 1, K, K\], got shape",
        ),
        (_branch(conv_weight=torch.zeros(16, 1, 9, 9)), ValueError, "key.conv_weight: a 9 x 9 filter is larger than"),
        (_branch(weight=torch.zeros(16)), ValueError, r"key.weight: expected \[C_out, C\], got shape \(16,\)"),
        (_branch(weight=torch.zeros(0, 16)), ValueError, r"key.weight: expected \[C_out, C\], got shape \(0, 16\)"),
        (_branch(bias=torch.zeros(15)), ValueError, r"key.bias: expected shape \(16,\), got \(15,\)"),
        (
            _branch(weight=torch.zeros(16, 16, dtype=torch.bfloat16)),
            TypeError,
            "key.weight: bfloat16 parameters do not go with float32 activations; expected float32 or",
        ),
        (
            _branch(bn=None),
            ValueError,
            "query.bn, key.bn, value.bn: expected all three in the same mode, or none at all",
        ),
        (_bn(training=True), ValueError, "query.bn, key.bn, value.bn: expected all three in the same mode"),
        (_branch(bn=nn.BatchNorm2d(16)), TypeError, "key.bn: expected a BatchNorm or None, got BatchNorm2d"),
        (_bn(running_var=None), ValueError, "key.bn: expected running statistics outside training, got None"),
        (_bn(eps=-1.0), ValueError, "key.bn.eps: expected a finite number in .*, got -1"),
        (_bn(training=True, momentum=None), TypeError, "key.bn.momentum: expected a number, got NoneType"),
        (
            _bn(training=True, momentum=1.5),
            ValueError,
            r"key.bn.momentum: expected a finite number in \[0, 1\], got 1.5",
        ),
        (_bn(training=True, running_var=None), ValueError, "key.bn: expected both running statistics or none"),
        ({"backend": "gpu"}, ValueError, "backend: unknown backend 'gpu'"),
    ],
)
def test_bad_arguments(change, error, message):
    arguments = inputs.tagged(inputs.CONV_PROJECTION, "smallest")[0].call().arguments
    changes = change(arguments) if callable(change) else change
    with pytest.raises(error, match=message):
        conv_projection(**{**arguments, **changes})


def test_autocast_takes_parameters_of_its_own_dtype():
    call = inputs.conv_projection_case("bf16 parameters").call(inputs.Precision(torch.float32, torch.bfloat16))
    with pytest.raises(TypeError, match="do not go with float32 activations"):
        call()
    with torch.autocast("cpu", torch.bfloat16):
        assert all(o.dtype == torch.bfloat16 for o in call())


def test_padding_beyond_the_cpu_kernels_runs_on_the_reference():
    call = inputs.conv_projection_case("far", grid=(2, 2), channels=4, padding=(65, 65, 65)).call(inputs.FP32)
    q, k, v = call()
    assert q.shape == (2, 130 * 130, 4) and k.shape == v.shape == (2, 65 * 65, 4)
    with use_backend("cpu"), pytest.raises(BackendError, match="padding 65: the CPU kernels take at most 64"):
        call()
