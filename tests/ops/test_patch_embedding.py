"""patch_embedding: the contract, its formula in plain PyTorch, and its messages."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fastvit_kernels.ops import BatchNorm, patch_embedding
from fastvit_kernels.testing import inputs
from fastvit_kernels.testing.contract import Contract, Rejection

ACTIVATIONS = {
    None: lambda x: x,
    "gelu": F.gelu,
    "relu": F.relu,
    "silu": F.silu,
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
}


def plain_pytorch(
    x,
    weight,
    bias,
    stride,
    padding,
    activation=None,
    bn=None,
    bn_after_activation=False,
    norm_weight=None,
    norm_bias=None,
    norm_eps=None,
    in_norm_weight=None,
    in_norm_bias=None,
    in_norm_eps=None,
    in_scale=None,
    in_shift=None,
    out_scale=None,
    out_shift=None,
):
    x = scaled(x, in_scale, in_shift)
    if in_norm_eps is not None:
        rows = F.layer_norm(x.permute(0, 2, 3, 1), (x.shape[1],), in_norm_weight, in_norm_bias, in_norm_eps)
        x = rows.permute(0, 3, 1, 2)
    maps = F.conv2d(x, weight, bias, stride, padding)
    for step in ("act", "bn") if bn_after_activation else ("bn", "act"):
        if step == "act":
            maps = ACTIVATIONS[activation](maps)
        elif bn is not None:
            maps = F.batch_norm(maps, bn.running_mean, bn.running_var, bn.weight, bn.bias, bn.training, 0.0, bn.eps)
    if norm_eps is None:
        return scaled(maps, out_scale, out_shift)
    return F.layer_norm(maps.permute(0, 2, 3, 1), (len(weight),), norm_weight, norm_bias, norm_eps).permute(0, 3, 1, 2)


def scaled(maps, scale, shift):
    maps = maps if scale is None else maps * scale[:, None, None]
    return maps if shift is None else maps + shift[:, None, None]


class TestPatchEmbedding(Contract, Rejection):
    cases = inputs.PATCH_EMBEDDING
    fused = ("patch_embedding",)
    equivalent = staticmethod(plain_pytorch)
    resizable = frozenset({("x", 0), ("x", 2), ("x", 3)})
    reshaped = (
        [
            inputs.patch_embedding_case("small", batch=2, size=(9, 11)),
            inputs.patch_embedding_case("other", batch=3, size=(6, 4)),
            inputs.patch_embedding_case("large", batch=5, size=(12, 20)),
        ],
        {"x": (0, 2, 3)},
    )


class TestTraining(Contract):
    cases = inputs.PATCH_EMBEDDING_TRAINING
    fused = ("patch_embedding",)
    reshaped = TestPatchEmbedding.reshaped
    equivalent = staticmethod(plain_pytorch)
    # The batch's statistics come from PyTorch's operators, which make no such promise.
    test_bits_do_not_depend_on_the_thread_count = None


@pytest.mark.parametrize("after", [False, True])
def test_running_statistics_are_those_of_batch_norm(after):
    bn, expected = torch.nn.BatchNorm2d(16).train(), torch.nn.BatchNorm2d(16).train()
    case = inputs.patch_embedding_case("training", norm=False, activation="gelu")
    arguments = case.call().arguments
    ours = BatchNorm(bn.weight, bn.bias, bn.running_mean, bn.running_var, bn.eps, True, bn.momentum)
    patch_embedding(**arguments, bn=ours, bn_after_activation=after)
    maps = F.conv2d(arguments["x"], arguments["weight"], arguments["bias"], 2, 1)
    expected(F.gelu(maps) if after else maps)
    torch.testing.assert_close(bn.running_mean, expected.running_mean)
    torch.testing.assert_close(bn.running_var, expected.running_var)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.zeros(6, 9, 11)}, ValueError, r"x: expected 4 dimensions, got shape \(6, 9, 11\)"),
        ({"x": torch.zeros(2, 5, 9, 11)}, ValueError, r"weight: expected shape \(16, 5, 3, 3\), got \(16, 6, 3, 3\)"),
        ({"x": torch.zeros(2, 6, 0, 11)}, ValueError, "x: a 3 x 3 filter is larger than the padded"),
        ({"weight": torch.zeros(16, 6, 3)}, ValueError, r"weight: expected \[C_out, C, K, K\], got shape \(16, 6, 3\)"),
        ({"weight": torch.zeros(16, 6, 3, 2)}, ValueError, r"weight: expected shape \(16, 6, 2, 2\)"),
        ({"weight": torch.zeros(16, 6, 20, 20)}, ValueError, "x: a 20 x 20 filter is larger than the padded"),
        ({"bias": torch.zeros(6)}, ValueError, r"bias: expected shape \(16,\), got \(6,\)"),
        ({"norm_weight": torch.zeros(6)}, ValueError, r"norm_weight: expected shape \(16,\), got \(6,\)"),
        ({"norm_eps": None}, ValueError, "norm_eps: expected the LayerNorm's epsilon .* got None"),
        ({"norm_eps": float("inf")}, ValueError, "norm_eps: expected a finite number in .*, got inf"),
        ({"stride": 0}, ValueError, "stride: expected an integer of at least 1, got 0"),
        ({"stride": (2, 2)}, TypeError, "stride: expected an integer, got tuple"),
        ({"activation": "tanh"}, ValueError, "activation: expected one of gelu, .* or None, got 'tanh'"),
        ({"bn": torch.zeros(16)}, TypeError, "bn: expected a BatchNorm or None, got Tensor"),
        ({"bn": BatchNorm(None, None, None, None)}, ValueError, "bn: expected running statistics outside training"),
        (
            {"bn": BatchNorm(torch.ones(6), None, torch.ones(16), torch.ones(16))},
            ValueError,
            r"bn.weight: expected shape \(16,\), got \(6,\)",
        ),
        (
            {"x": torch.zeros(1, 6, 1, 1), "bn": BatchNorm(None, None, None, None, training=True)},
            ValueError,
            "x: expected more than 1 value per channel when training, got 1",
        ),
        ({"in_scale": torch.ones(5)}, ValueError, r"in_scale: expected shape \(6,\), got \(5,\)"),
        ({"out_shift": torch.ones(6)}, ValueError, r"out_shift: expected shape \(16,\), got \(6,\)"),
        ({"out_scale": torch.ones(16)}, ValueError, "out_scale, out_shift: expected None beside norm_eps, got a"),
        (
            {"in_shift": torch.ones(6), "in_norm_eps": 1e-5},
            ValueError,
            "in_scale, in_shift: expected None beside in_norm_eps, got a",
        ),
        ({"padding": -1}, ValueError, "padding: expected an integer of at least 0, got -1"),
        ({"padding": "same"}, TypeError, "padding: expected an integer, got str"),
        ({"bn_after_activation": "no"}, TypeError, "bn_after_activation: expected a bool, got str"),
        ({"norm_eps": True}, TypeError, "norm_eps: expected a number, got bool"),
    ],
)
def test_bad_arguments(change, error, message):
    arguments = inputs.tagged(inputs.PATCH_EMBEDDING, "smallest")[0].call().arguments
    with pytest.raises(error, match=message):
        patch_embedding(**{**arguments, **change})
