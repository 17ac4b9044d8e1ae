"""global_attention: the contract, its formula in plain PyTorch, and its messages."""

from __future__ import annotations

import torch.nn.functional as F

from fastvit_kernels.testing import inputs
from fastvit_kernels.testing.contract import Contract, Rejection


def plain_pytorch(q, k, v, num_heads, scale, proj_weight=None, proj_bias=None, residual=None):
    q, k, v = (t.unflatten(-1, (num_heads, -1)).transpose(1, 2) for t in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2).flatten(2)
    if proj_weight is not None:
        out = F.linear(out, proj_weight, proj_bias)
    return out if residual is None else residual + out


class TestGlobalAttention(Contract, Rejection):
    cases = inputs.GLOBAL_ATTENTION
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
