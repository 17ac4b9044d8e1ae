"""global_attention: the contract, its formula in plain PyTorch, and its messages."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F

from fastvit_kernels.ops import global_attention
from fastvit_kernels.testing import inputs
from fastvit_kernels.testing.contract import Contract, Rejection
from fastvit_kernels.testing.contract.base import run


def plain_pytorch(
    q,
    k,
    v,
    num_heads,
    scale,
    norm=None,
    norm_weight=None,
    norm_bias=None,
    norm_eps=None,
    norm_statistics=None,
    query_weight=None,
    query_bias=None,
    add_query_input=False,
    attn_bias=None,
    proj_weight=None,
    proj_bias=None,
    residual=None,
    return_statistics=False,
):
    rows = q
    if norm == "layer":
        rows = F.layer_norm(q, q.shape[-1:], norm_weight, norm_bias, norm_eps)
    elif norm_statistics is not None:
        mean, var = norm_statistics[:, None, None, 0], norm_statistics[:, None, None, 1]
        rows = (q - mean) / (var + norm_eps).sqrt() * norm_weight + norm_bias
    elif norm == "group":
        rows = F.group_norm(q.transpose(1, 2), 1, norm_weight, norm_bias, norm_eps).transpose(1, 2)
    q = rows if query_weight is None else F.linear(rows, query_weight, query_bias)
    k, v = k.chunk(2, dim=-1) if v is None else (k, v)
    q, k, v = (t.unflatten(-1, (num_heads, -1)).transpose(1, 2) for t in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_bias, scale=scale).transpose(1, 2).flatten(2)
    out = out + rows if add_query_input else out
    if proj_weight is not None:
        out = F.linear(out, proj_weight, proj_bias)
    out = out if residual is None else residual + out
    if not return_statistics:
        return out
    flat = out.flatten(1)
    return out, torch.stack([flat.mean(1), flat.var(1, correction=0)], 1)


class TestGlobalAttention(Contract, Rejection):
    # In gradients of few numbers the errors of kernel and reference are independent.
    draws = 3
    cases = inputs.GLOBAL_ATTENTION
    precisions = {**Contract.precisions, "sdpa": (inputs.FP32, inputs.BF16)}
    fused = ("global_attention",)
    resizable = frozenset({("q", 1), ("v", 2)})
    equivalent = staticmethod(plain_pytorch)
    reshaped = (
        [
            inputs.global_attention_case("small", batch=2, queries=9, keys=5),
            inputs.global_attention_case("other", batch=3, queries=4, keys=12),
            inputs.global_attention_case("large", batch=5, queries=20, keys=7),
        ],
        {"q": (0, 1), "k": (0, 1), "v": (0, 1), "residual": (0, 1)},
    )

    def test_pytorchs_attention_in_every_case(self, case):
        """The suite's other checks of this backend are for the smallest cases."""
        for precision in (inputs.FP32, inputs.BF16, inputs.FP16):
            self.hold(case, precision, partial(run, backend="sdpa"))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"q": torch.zeros(9, 16)}, ValueError, r"q: expected 3 dimensions, got shape \(9, 16\)"),
        ({"k": torch.zeros(2, 5, 16).double()}, TypeError, "k: expected float32 like q, got float64"),
        ({"v": torch.zeros(2, 5, 16, device="meta")}, ValueError, "v: expected device cpu, got meta"),
        ({"k": torch.zeros(1, 5, 16)}, ValueError, r"k: expected batch 2 and 5 rows, got \(1, 5, 16\)"),
        ({"v": torch.zeros(2, 6, 16)}, ValueError, r"v: expected batch 2 and 5 rows, got \(2, 6, 16\)"),
        ({"k": torch.zeros(2, 5, 18)}, ValueError, "k: expected 16 channels for queries of 16, got 18"),
        (
            {"k": torch.zeros(2, 0, 16), "v": torch.zeros(2, 0, 16)},
            ValueError,
            "k: expected at least one key, got none",
        ),
        ({"num_heads": 3}, ValueError, "num_heads: 3 does not divide 16 and 16 channels"),
        ({"num_heads": 0}, ValueError, "num_heads: expected an integer of at least 1, got 0"),
        ({"num_heads": 2.0}, TypeError, "num_heads: expected an integer, got float"),
        ({"scale": None}, TypeError, "scale: expected a number, got NoneType"),
        ({"scale": torch.tensor(0.5)}, TypeError, "scale: expected a number, got Tensor"),
        ({"scale": float("nan")}, ValueError, "scale: expected a finite number in .*, got nan"),
        ({"scale": float("inf")}, ValueError, "scale: expected a finite number in .*, got inf"),
        ({"proj_weight": None}, ValueError, "proj_bias: expected a proj_weight beside it, got None"),
        ({"proj_weight": torch.zeros(16)}, ValueError, r"proj_weight: expected \[C_out, C_v\], got shape \(16,\)"),
        ({"proj_weight": torch.zeros(16, 8)}, ValueError, r"proj_weight: expected shape \(16, 16\), got \(16, 8\)"),
        ({"proj_bias": torch.zeros(8)}, ValueError, r"proj_bias: expected shape \(16,\), got \(8,\)"),
        ({"residual": torch.zeros(2, 5, 16)}, ValueError, r"residual: expected shape \(2, 9, 16\), got \(2, 5, 16\)"),
        ({"residual": torch.zeros(2, 9, 16).double()}, TypeError, "residual: float64 does not go with float32"),
        ({"residual": 1.0}, TypeError, "residual: expected a torch.Tensor, got float"),
        ({"add_query_input": "no"}, TypeError, "add_query_input: expected a bool, got str"),
        ({"return_statistics": "no"}, TypeError, "return_statistics: expected a bool, got str"),
        ({"scale": True}, TypeError, "scale: expected a number, got bool"),
    ],
)
def test_bad_arguments(change, error, message):
    arguments = inputs.tagged(inputs.GLOBAL_ATTENTION, "smallest")[0].call().arguments
    with pytest.raises(error, match=message):
        global_attention(**{**arguments, **change})


@pytest.mark.parametrize("residual", [None, torch.float32, torch.bfloat16, torch.float16])
def test_the_result_has_the_promoted_dtype(residual):
    """Of the compute dtype and the residual, which no autocast narrows."""
    for autocast in (False, True):
        for dtype in (torch.float32, torch.bfloat16):
            x = torch.ones(1, 2, 4, dtype=dtype)
            added = None if residual is None else torch.ones(1, 2, 4, dtype=residual)
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                found = global_attention(x, x, x, num_heads=1, scale=1.0, residual=added)
            compute = torch.bfloat16 if autocast else dtype
            assert found.dtype == (compute if residual is None else torch.promote_types(compute, residual))
