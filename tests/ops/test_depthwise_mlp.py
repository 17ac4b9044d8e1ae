"""depthwise_mlp: the contract, its formula in plain PyTorch, and its messages."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fastvit_kernels.ops import BatchNorm, depthwise_mlp
from fastvit_kernels.testing import inputs
from fastvit_kernels.testing.contract import Contract, Rejection

ACTIVATIONS = {
    None: lambda x: x,
    "gelu": F.gelu,
    "relu": F.relu,
    "silu": F.silu,
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
}


def _batch_norm(x, bn):
    if bn is None:
        return x
    return F.batch_norm(x, bn.running_mean, bn.running_var, bn.weight, bn.bias, bn.training, bn.momentum, bn.eps)


def plain_pytorch(
    x,
    fc1_weight,
    fc1_bias,
    dw_weight,
    dw_bias,
    fc2_weight,
    fc2_bias,
    grid,
    activation,
    hidden_activation=None,
    inner_residual=None,
    norm=None,
    norm_weight=None,
    norm_bias=None,
    norm_eps=None,
    norm_statistics=None,
    bn1=None,
    bn2=None,
    bn3=None,
    bn_after_activation=False,
    out_norm_weight=None,
    out_norm_bias=None,
    out_norm_eps=None,
    residual=None,
    num_prefix_tokens=0,
    return_statistics=False,
    return_mean=False,
):
    """Everything as NCHW maps and one-by-one convolutions, as the original models write it."""
    prefix = num_prefix_tokens
    maps = x[:, prefix:].transpose(1, 2).unflatten(2, grid)
    if norm == "layer":
        maps = F.layer_norm(maps.movedim(1, -1), (x.shape[-1],), norm_weight, norm_bias, norm_eps).movedim(-1, 1)
    elif norm_statistics is not None:
        mean, var = norm_statistics[:, :, None, None, None].unbind(1)
        maps = (maps - mean) / (var + norm_eps).sqrt() * norm_weight[:, None, None] + norm_bias[:, None, None]
    elif norm == "group":
        maps = F.group_norm(maps, 1, norm_weight, norm_bias, norm_eps)
    h = F.conv2d(maps, fc1_weight[:, :, None, None], fc1_bias)
    first, second = ACTIVATIONS[hidden_activation], ACTIVATIONS[activation]
    h = _batch_norm(first(h), bn1) if bn_after_activation else first(_batch_norm(h, bn1))
    y = F.conv2d(h, dw_weight, dw_bias, padding=dw_weight.shape[-1] // 2, groups=len(dw_weight))
    y = y + h if inner_residual == "before_activation" else y
    y = _batch_norm(second(y), bn2) if bn_after_activation else second(_batch_norm(y, bn2))
    y = y + h if inner_residual == "after_activation" else y
    z = _batch_norm(F.conv2d(y, fc2_weight[:, :, None, None], fc2_bias), bn3)
    if out_norm_eps is not None:
        z = F.group_norm(z, 1, out_norm_weight, out_norm_bias, out_norm_eps)
    rows = z.flatten(2).transpose(1, 2)
    out = torch.cat([rows.new_zeros(len(x), prefix, rows.shape[-1]), rows], 1)
    out = out if residual is None else residual + out
    if return_mean:
        return out, z.mean((2, 3))
    if return_statistics:
        flat = out[:, prefix:].flatten(1)
        return out, torch.stack([flat.mean(1), flat.var(1, correction=0)], 1)
    return out


class TestDepthwiseMlp(Contract, Rejection):
    cases = inputs.DEPTHWISE_MLP
    fused = ("depthwise_mlp",)
    equivalent = staticmethod(plain_pytorch)
    # The gradient of given statistics is two numbers per image.
    draws = 2
    resizable = frozenset()
    reshaped = (
        [
            inputs.depthwise_mlp_case("small", batch=2),
            inputs.depthwise_mlp_case("other", batch=3),
            inputs.depthwise_mlp_case("large", batch=5),
        ],
        {"x": (0,), "residual": (0,)},
    )


class TestTraining(Contract):
    cases = inputs.DEPTHWISE_MLP_TRAINING
    fused = ("depthwise_mlp",)
    reshaped = TestDepthwiseMlp.reshaped
    equivalent = staticmethod(plain_pytorch)
    # Triton's gradients through batch statistics are the matter of test_triton_gradients.py.
    precisions = {"cpu": Contract.precisions["cpu"]}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.zeros(35, 16)}, ValueError, r"x: expected 3 dimensions, got shape \(35, 16\)"),
        ({"grid": (5, 8)}, ValueError, "grid: 5 x 8 and 0 prefix tokens do not make the 35 tokens of x"),
        ({"grid": None}, ValueError, r"grid: expected \(H, W\) beside .* got None"),
        ({"num_prefix_tokens": -1}, ValueError, "num_prefix_tokens: expected an integer of at least 0, got -1"),
        ({"fc1_weight": torch.zeros(40, 15)}, ValueError, r"fc1_weight: expected shape \(40, 16\), got \(40, 15\)"),
        ({"fc1_bias": torch.zeros(41)}, ValueError, r"fc1_bias: expected shape \(40,\), got \(41,\)"),
        ({"dw_weight": torch.zeros(40, 1, 2, 2)}, ValueError, "dw_weight: expected an odd kernel, got 2 x 2"),
        ({"dw_weight": torch.zeros(40, 2, 3, 3)}, ValueError, r"dw_weight: expected shape \(40, 1, 3, 3\)"),
        ({"fc2_weight": torch.zeros(16, 39)}, ValueError, r"fc2_weight: expected shape \(16, 40\), got \(16, 39\)"),
        ({"activation": "tanh"}, ValueError, "activation: expected one of gelu, .* got 'tanh'"),
        ({"activation": None}, ValueError, "activation: expected one of gelu, .* got None"),
        ({"hidden_activation": "swish"}, ValueError, "hidden_activation: expected one of gelu, .* got 'swish'"),
        ({"inner_residual": "after"}, ValueError, "inner_residual: expected one of before_activation, .* got 'after'"),
        ({"norm": "batch"}, ValueError, 'norm: expected "layer", "group" or None, got \'batch\''),
        ({"norm": None}, ValueError, 'norm: expected "layer" or "group" beside norm_weight, got None'),
        ({"norm_eps": None}, ValueError, "norm_eps: expected the norm's epsilon beside norm, got None"),
        ({"norm_statistics": torch.zeros(2, 2)}, ValueError, 'norm_statistics: expected them with norm="group" only'),
        ({"bn1": torch.zeros(40)}, TypeError, "bn1: expected a BatchNorm or None, got Tensor"),
        ({"bn2": BatchNorm(None, None, None, None)}, ValueError, "bn2: expected running statistics outside training"),
        (
            {"bn3": BatchNorm(torch.ones(40), None, torch.ones(40), torch.ones(40))},
            ValueError,
            r"bn3.weight: expected shape \(16,\), got \(40,\)",
        ),
        (
            {
                "bn1": BatchNorm(None, None, torch.zeros(40), torch.ones(40), training=True),
                "bn2": BatchNorm(None, None, torch.zeros(40), torch.ones(40)),
            },
            ValueError,
            "bn1, bn2, bn3: expected all of them in the same mode",
        ),
        ({"out_norm_weight": torch.ones(16)}, ValueError, "out_norm_eps: expected the epsilon beside out_norm_weight"),
        ({"residual": torch.zeros(2, 35, 15)}, ValueError, r"residual: expected shape \(2, 35, 16\)"),
        (
            {"return_mean": True, "return_statistics": True},
            ValueError,
            "return_mean: expected False beside return_statistics, got True",
        ),
        ({"bn_after_activation": "no"}, TypeError, "bn_after_activation: expected a bool, got str"),
        ({"return_mean": "yes"}, TypeError, "return_mean: expected a bool, got str"),
        ({"return_statistics": 1}, TypeError, "return_statistics: expected a bool, got int"),
        ({"norm": "layer", "norm_eps": True}, TypeError, "norm_eps: expected a number, got bool"),
        ({"inner_residual": False}, ValueError, "inner_residual: expected one of before_activation, .* got False"),
        ({"bn1": BatchNorm(None, None, None, None, training="no")}, TypeError, "bn1.training: expected a bool, got"),
        ({"packed": 1}, TypeError, "packed: expected PackedWeights or None, got int"),
        (
            {"packed": 1, "bn1": BatchNorm(None, None, None, None, training=True)},
            TypeError,
            "packed: expected PackedWeights or None, got int",
        ),
    ],
)
def test_bad_arguments(change, error, message):
    arguments = inputs.tagged(inputs.DEPTHWISE_MLP, "smallest")[0].call().arguments
    with pytest.raises(error, match=message):
        depthwise_mlp(**{**arguments, **change})


def test_running_statistics_are_those_of_batch_norm():
    bns = [torch.nn.BatchNorm2d(width).train() for width in (40, 40, 16)]
    call = inputs.depthwise_mlp_case("training", bias=False).call()
    arguments = call.arguments
    expected = [torch.nn.BatchNorm2d(width).train() for width in (40, 40, 16)]
    x = F.layer_norm(arguments["x"], (16,), arguments["norm_weight"], arguments["norm_bias"], 1e-3)
    h = expected[0](F.linear(x, arguments["fc1_weight"]).transpose(1, 2).unflatten(2, (5, 7)))
    y = F.gelu(expected[1](F.conv2d(h, arguments["dw_weight"], padding=1, groups=40)))
    expected[2](F.conv2d(y, arguments["fc2_weight"][:, :, None, None]))
    ours = {
        f"bn{i}": BatchNorm(bn.weight, bn.bias, bn.running_mean, bn.running_var, bn.eps, True, bn.momentum)
        for i, bn in enumerate(bns, 1)
    }
    depthwise_mlp(**{**arguments, **ours})
    for one, other in zip(bns, expected, strict=True):
        torch.testing.assert_close(one.running_mean, other.running_mean)
        torch.testing.assert_close(one.running_var, other.running_var)


def test_training_on_one_value_per_channel_is_refused():
    bn = BatchNorm(None, None, None, None, training=True)
    arguments = inputs.depthwise_mlp_case("pixel", batch=1, grid=(1, 1)).call().arguments
    with pytest.raises(ValueError, match="x: expected more than 1 value per channel when training, got 1"):
        depthwise_mlp(**{**arguments, "bn1": bn})
