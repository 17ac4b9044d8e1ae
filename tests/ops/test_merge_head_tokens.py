"""merge_head_tokens: the contract, its formula in plain PyTorch, and its messages."""

from __future__ import annotations

from typing import ClassVar

import pytest
import torch

from fastvit_kernels.ops import merge_head_tokens
from fastvit_kernels.testing import inputs
from fastvit_kernels.testing.contract import Contract, Rejection


def plain_pytorch(x, num_heads, residual=None):
    rows, heads = x[:, :-num_heads], x[:, -num_heads:]
    rows = torch.cat([rows[:, :1] + sum(heads.unbind(1)).unsqueeze(1) / num_heads, rows[:, 1:]], 1)
    return rows if residual is None else residual + rows


class TestMergeHeadTokens(Contract, Rejection):
    cases = inputs.MERGE_HEAD_TOKENS
    fused = ("merge_head_tokens",)
    precisions: ClassVar = {"cpu": (inputs.FP32, inputs.BF16), "triton": (inputs.FP32, inputs.FP16)}
    equivalent = staticmethod(plain_pytorch)
    resizable = frozenset({("x", 0), ("x", 1), ("x", 2)})
    reshaped = (
        [
            inputs.merge_head_tokens_case("small", batch=2, tokens=7),
            inputs.merge_head_tokens_case("other", batch=3, tokens=5),
            inputs.merge_head_tokens_case("large", batch=5, tokens=20),
        ],
        {"x": (0, 1), "residual": (0, 1)},
    )


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.zeros(2, 24)}, ValueError, r"x: expected 3 dimensions, got shape \(2, 24\)"),
        ({"x": torch.zeros(2, 3, 24)}, ValueError, r"x: expected more than 3 tokens, got shape \(2, 3, 24\)"),
        ({"num_heads": 0}, ValueError, "num_heads: expected"),
        ({"num_heads": 2.0}, TypeError, "num_heads: expected an integer, got float"),
        ({"residual": torch.zeros(2, 8, 24)}, ValueError, r"residual: expected shape \(2, 7, 24\), got \(2, 8, 24\)"),
    ],
)
def test_bad_arguments(change, error, message):
    arguments = inputs.tagged(inputs.MERGE_HEAD_TOKENS, "smallest")[0].call().arguments
    with pytest.raises(error, match=message):
        merge_head_tokens(**{**arguments, **change})
