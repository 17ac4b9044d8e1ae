"""pointwise_mlp: the contract, its formula in plain PyTorch, and its messages."""

from __future__ import annotations

import torch
import torch.nn.functional as F

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
