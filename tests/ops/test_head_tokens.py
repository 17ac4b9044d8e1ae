"""head_tokens: the contract, its formula in plain PyTorch, and its messages."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fastvit_kernels.ops import head_tokens
from fastvit_kernels.testing import inputs
from fastvit_kernels.testing.contract import Contract, Rejection


def plain_pytorch(
    x,
    weight,
    bias,
    pos_embed,
    num_heads,
    head_norm_eps,
    head_norm_weight=None,
    head_norm_bias=None,
    norm_weight=None,
    norm_bias=None,
    norm_eps=None,
):
    if norm_eps is not None:
        x = F.layer_norm(x, x.shape[-1:], norm_weight, norm_bias, norm_eps)
    width = x.shape[-1] // num_heads
    found = []
    for head, position in zip(x.mean(1).split(width, -1), pos_embed, strict=True):
        pieces = F.linear(head, weight, bias).split(width, -1)
        pieces = [F.layer_norm(piece, (width,), head_norm_weight, head_norm_bias, head_norm_eps) for piece in pieces]
        found.append(F.gelu(torch.cat(pieces, -1)) + position)
    return torch.cat([x, torch.stack(found, 1)], 1)


class TestHeadTokens(Contract, Rejection):
    cases = inputs.HEAD_TOKENS
    fused = ("head_tokens",)
    equivalent = staticmethod(plain_pytorch)
    resizable = frozenset({("x", 0), ("x", 1)})
    reshaped = (
        [
            inputs.head_tokens_case("small", batch=2, tokens=7),
            inputs.head_tokens_case("other", batch=3, tokens=5),
            inputs.head_tokens_case("large", batch=5, tokens=20),
        ],
        {"x": (0, 1)},
    )


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.zeros(2, 24)}, ValueError, r"x: expected 3 dimensions, got shape \(2, 24\)"),
        ({"x": torch.zeros(2, 0, 24)}, ValueError, r"x: expected at least one token, got shape \(2, 0, 24\)"),
        ({"num_heads": 5}, ValueError, "num_heads: 5 does not divide 24 channels"),
        ({"num_heads": 2.0}, TypeError, "num_heads: expected an integer, got float"),
        ({"weight": torch.zeros(24, 9)}, ValueError, r"weight: expected shape \(24, 8\), got \(24, 9\)"),
        ({"pos_embed": torch.zeros(24)}, ValueError, r"pos_embed: expected shape \(3, 24\), got \(24,\)"),
        ({"head_norm_bias": torch.zeros(24)}, ValueError, r"head_norm_bias: expected shape \(8,\), got \(24,\)"),
        ({"head_norm_eps": None}, TypeError, "head_norm_eps: expected a number, got NoneType"),
        ({"norm_eps": None}, ValueError, "norm_eps: expected the LayerNorm's epsilon"),
    ],
)
def test_bad_arguments(change, error, message):
    arguments = inputs.tagged(inputs.HEAD_TOKENS, "smallest")[0].call().arguments
    with pytest.raises(error, match=message):
        head_tokens(**{**arguments, **change})
