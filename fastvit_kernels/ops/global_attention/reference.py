"""Multi-head attention over token rows in plain PyTorch: the definition of the operator."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastvit_kernels.ops.attention import Attend, attend
from fastvit_kernels.ops.normalization import group_statistics, normalize_by
from fastvit_kernels.ops.operator import Outputs, Tensors
from fastvit_kernels.ops.precision import wide


class Static(NamedTuple):
    """The operator's static arguments."""

    num_heads: int
    scale: float
    norm: str
    norm_eps: float
    add_query_input: bool
    return_statistics: bool
    dtype: torch.dtype


STATIC_SCHEMA = (
    "int num_heads, float scale, str norm, float norm_eps, bool add_query_input, bool return_statistics, "
    "ScalarType dtype"
)


def reference(tensors: Tensors, static: Static) -> Outputs:
    """`softmax(q k^T * scale + bias) v` per head, then linear and residual.

    Of `[q, k, v, proj_weight, proj_bias, norm_weight, norm_bias, query_weight, query_bias, attn_bias, norm_statistics,
    residual]`; without v, k holds both.
    """
    return around(attend, tensors, static)


def around(attention: Attend, tensors: Tensors, static: Static) -> Outputs:
    """The operator with this attention of heads in its middle."""
    (
        q,
        k,
        v,
        proj_weight,
        proj_bias,
        norm_weight,
        norm_bias,
        query_weight,
        query_bias,
        attn_bias,
        statistics,
        residual,
    ) = tensors
    assert q is not None and k is not None
    if v is None:
        k, v = k.chunk(2, dim=-1)
    rows = normalize_by(static.norm, q, statistics, norm_weight, norm_bias, static.norm_eps, static.dtype)
    queries = rows if query_weight is None else _linear(rows, query_weight, query_bias, static.dtype)
    q, k, v = (t.to(static.dtype).unflatten(-1, (static.num_heads, -1)).transpose(1, 2) for t in (queries, k, v))
    out = attention(q, k, v, attn_bias, None, static.scale).transpose(1, 2).flatten(2)
    if static.add_query_input:
        out = out + rows
    if proj_weight is not None:
        out = _linear(out, proj_weight, proj_bias, static.dtype)
    out = out if residual is None else residual + out
    return out, group_statistics(out) if static.return_statistics else out.new_empty(0, dtype=wide(out.dtype))


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    return F.linear(x, weight.to(dtype), None if bias is None else bias.to(dtype))
