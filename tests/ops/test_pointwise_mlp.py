"""pointwise_mlp: the contract, its formula in plain PyTorch, and its messages."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fastvit_kernels.ops import pointwise_mlp
from fastvit_kernels.testing import inputs
from fastvit_kernels.testing.contract import Contract, Rejection


def plain_pytorch(
    x, weight1, bias1, weight2, bias2, activation, norm_weight=None, norm_bias=None, norm_eps=None, residual=None
):
    h = x if norm_eps is None else F.layer_norm(x, x.shape[-1:], norm_weight, norm_bias, norm_eps)
    h = F.linear(h, weight1, bias1)
    h = F.gelu(h) if activation == "gelu" else h / (1 + torch.exp(-1.702 * h))
    out = F.linear(h, weight2, bias2)
    return out if residual is None else residual + out


class TestPointwiseMLP(Contract, Rejection):
    cases = inputs.POINTWISE_MLP
    fused = ("pointwise_mlp",)
    equivalent = staticmethod(plain_pytorch)
    reshaped = (
        [
            inputs.pointwise_mlp_case("small", leading=(2, 9)),
            inputs.pointwise_mlp_case("other", leading=(3, 4)),
            inputs.pointwise_mlp_case("large", leading=(5, 30)),
        ],
        {"x": (0, 1), "residual": (0, 1)},
    )


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.zeros(())}, ValueError, r"x: expected at least one channel in the last axis, got shape \(\)"),
        ({"x": torch.zeros(3, 0)}, ValueError, "x: expected at least one channel in the last axis"),
        ({"x": torch.zeros(3, 16).half().to_sparse()}, TypeError, "x: expected a strided tensor"),
        ({"activation": "relu"}, ValueError, "activation: expected one of gelu, quick_gelu, got 'relu'"),
        ({"activation": None}, ValueError, "activation: expected one of gelu, quick_gelu, got None"),
        ({"activation": F.gelu}, ValueError, "activation: expected one of gelu, quick_gelu, got <built-in"),
        ({"weight1": None}, TypeError, "weight1: expected a torch.Tensor, got NoneType"),
        ({"weight2": torch.zeros(40)}, ValueError, r"weight2: expected \[C_out, C_hidden\], got shape \(40,\)"),
        ({"weight1": torch.zeros(0, 16)}, ValueError, r"weight1: expected \[C_hidden, C\], got shape \(0, 16\)"),
        ({"weight1": torch.zeros(40, 15)}, ValueError, r"weight1: expected shape \(40, 16\), got \(40, 15\)"),
        ({"bias1": torch.zeros(16)}, ValueError, r"bias1: expected shape \(40,\), got \(16,\)"),
        ({"weight2": torch.zeros(16, 41)}, ValueError, r"weight2: expected shape \(16, 40\), got \(16, 41\)"),
        ({"bias2": torch.zeros(1, 16)}, ValueError, r"bias2: expected shape \(16,\), got \(1, 16\)"),
        ({"bias2": torch.zeros(16).half()}, TypeError, "bias2: float16 parameters do not go with float32 activations"),
        ({"norm_eps": None}, ValueError, "norm_eps: expected the LayerNorm's epsilon .* got None"),
        ({"norm_eps": -1.0}, ValueError, "norm_eps: expected a finite number in .*, got -1"),
        ({"norm_bias": torch.zeros(40)}, ValueError, r"norm_bias: expected shape \(16,\), got \(40,\)"),
        ({"residual": torch.zeros(2, 9, 1)}, ValueError, r"residual: expected shape \(2, 9, 16\), got \(2, 9, 1\)"),
        ({"residual": torch.zeros(2, 9, 16).long()}, TypeError, "residual: expected one of float64, float32, .* int64"),
        ({"residual": torch.zeros(2, 9, 16, device="meta")}, ValueError, "residual: expected device cpu, got meta"),
    ],
)
def test_bad_arguments(change, error, message):
    arguments = inputs.tagged(inputs.POINTWISE_MLP, "smallest")[0].call().arguments
    with pytest.raises(error, match=message):
        pointwise_mlp(**{**arguments, **change})


def test_fp64_does_not_mix():
    arguments = inputs.tagged(inputs.POINTWISE_MLP, "smallest")[0].call(inputs.FP64).arguments
    with pytest.raises(
        TypeError, match="weight1: float32 parameters do not go with float64 .* expected the activations'"
    ):
        pointwise_mlp(**{**arguments, "weight1": arguments["weight1"].float()})
