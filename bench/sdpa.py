"""`F.scaled_dot_product_attention` in place of an explicit softmax: in `global_attention` and in the plain models."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch.nn.functional as F
from torch import Tensor

from fastvit_kernels.bench import plain_attention
from fastvit_kernels.ops import library
from fastvit_kernels.ops.global_attention.reference import Static
from fastvit_kernels.ops.normalization import normalize_by
from fastvit_kernels.ops.operator import Outputs, Tensors
from fastvit_kernels.ops.precision import wide


@contextmanager
def sdpa_attention() -> Iterator[None]:
    """Inside, the reference of `global_attention` and the plain models attend by PyTorch's function."""
    operator = library.operators["global_attention"]
    previous, operator.reference = operator.reference, _reference
    try:
        with plain_attention.sdpa():
            yield
    finally:
        operator.reference = previous


def _reference(tensors: Tensors, static: Static) -> Outputs:
    q, k, v, proj_weight, proj_bias, norm_weight, norm_bias, query_weight, query_bias, table, means, residual = tensors
    assert q is not None and k is not None
    if v is None:
        k, v = k.chunk(2, dim=-1)
    rows = normalize_by(static.norm, q, means, norm_weight, norm_bias, static.norm_eps, static.dtype)
    queries = _linear(rows, query_weight, query_bias)
    q, k, v = (t.to(static.dtype).unflatten(-1, (static.num_heads, -1)).transpose(1, 2) for t in (queries, k, v))
    table = None if table is None else table.to(static.dtype)
    out = F.scaled_dot_product_attention(q, k, v, table, scale=static.scale).transpose(1, 2).flatten(2)
    out = _linear(out + rows if static.add_query_input else out, proj_weight, proj_bias)
    out = out if residual is None else residual + out
    # No case asks for statistics.
    assert not static.return_statistics
    return out, out.new_empty(0, dtype=wide(out.dtype))


def _linear(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    return x if weight is None else F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
