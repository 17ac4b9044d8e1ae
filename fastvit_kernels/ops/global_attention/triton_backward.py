"""Gradients of global_attention in Triton: projections and norm around the attention's own."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastvit_kernels.ops import library
from fastvit_kernels.ops.global_attention.reference import Static
from fastvit_kernels.ops.global_attention.triton_kernels import attend
from fastvit_kernels.ops.operator import Tensors
from fastvit_kernels.ops.triton_attention_gradients import Attention, AttentionGradients
from fastvit_kernels.ops.triton_gradients import input_gradient, weight_gradient
from fastvit_kernels.ops.triton_linear import linear
from fastvit_kernels.ops.triton_moments import group_statistics
from fastvit_kernels.ops.triton_norm_gradients import add_statistics_gradient, norm_gradient
from fastvit_kernels.ops.triton_normalization import normalize_rows
from fastvit_kernels.ops.triton_sums import sum_parts

# Elements of fp32 between addresses that Triton compiles alike for: then no size decides.
_ALIGNMENT = 4


def run(grads: Sequence[Tensor], tensors: Tensors, needs: Sequence[bool], static: Static) -> list[Tensor]:
    """Rows, queries and where it is needed the attention again; then backwards, as far as gradients are needed."""
    if grads[0].numel() == 0:
        return [torch.zeros_like(t) for t, needed in zip(tensors, needs, strict=True) if needed and t is not None]
    tensors = library.dense(tensors)
    q, packed, v, proj_weight, proj_bias, norm_weight, norm_bias, query_weight, query_bias, bias, *rest = tensors
    statistics, residual = rest
    assert q is not None and packed is not None
    grad, dtype = grads[0].contiguous(), static.dtype
    found: list[Tensor | None] = [None] * len(tensors)
    k, values = packed.chunk(2, dim=-1) if v is None else (packed, v)
    rows = q
    if static.norm != "none":
        rows = torch.empty_like(q, dtype=dtype)
        if static.norm == "group" and statistics is None:
            normalize_rows(q, rows, norm_weight, norm_bias, static.norm_eps, statistics=group_statistics(q))
        else:
            normalize_rows(q, rows, norm_weight, norm_bias, static.norm_eps, statistics=statistics)
    queries = rows if query_weight is None else linear(rows, query_weight, query_bias, dtype)
    attended = None
    if static.return_statistics or (needs[3] and proj_weight is not None):
        added = rows if static.add_query_input else None
        attended, _ = attend(queries, k, values, bias, static, residual=added)
    if static.return_statistics:
        assert attended is not None
        out = attended
        if proj_weight is not None:
            out = linear(attended, proj_weight, proj_bias, dtype, residual=residual)
        elif residual is not None:
            out = residual + out
        grad = add_statistics_gradient(grad, out.to(grad.dtype), grads[1])
    if needs[11] and residual is not None:
        found[11] = grad.to(residual.dtype, copy=True)
    if proj_weight is not None:
        if attended is not None or needs[4]:
            operand = grad if attended is None else attended
            found[3:5] = weight_gradient(grad, operand, proj_weight, proj_bias, dtype, needs[3:5])
        grad = input_gradient(grad, proj_weight, dtype, dtype)
    behind_query = needs[0] or any(needs[5:9]) or needs[10]
    if behind_query or needs[1] or needs[2] or needs[9]:
        attention = Attention(queries, k, values, grad, bias, static.num_heads, static.scale, dtype)
        through = AttentionGradients(attention)
        if needs[1] or needs[2]:
            found[1:3] = _of_keys(through, packed, v)
        if needs[9] and bias is not None:
            found[9] = through.of_bias()
        if behind_query:
            query_grad = torch.empty_like(queries, dtype=dtype)
            through.of_queries(query_grad)
            _through_rows(query_grad, grad, rows, tensors, needs, static, found)
    return [g for g, needed in zip(found, needs, strict=True) if needed and g is not None]


def _of_keys(through: AttentionGradients, k: Tensor, v: Tensor | None) -> list[Tensor | None]:
    """The gradients of k and v; without v those of keys and values side by side."""
    num_parts, part_queries = through.parts_of_queries()
    if num_parts == 1:
        found = [torch.empty_like(k), None if v is None else torch.empty_like(v)]
        keys = found[0]
        assert keys is not None
        key_grad, value_grad = keys.chunk(2, dim=-1) if v is None else (keys, found[1])
        assert value_grad is not None
        through.of_keys(key_grad, value_grad)
        return found
    size, first = k.numel(), -(-k.numel() // _ALIGNMENT) * _ALIGNMENT
    parts = k.new_empty((num_parts, size if v is None else first + v.numel()), dtype=torch.float32)
    keys = parts[:, :size].view(num_parts, *k.shape)
    if v is None:
        key_parts, value_parts = keys.chunk(2, dim=-1)
        through.of_keys(key_parts, value_parts, part_queries)
        return [sum_parts(parts, k)[0], None]
    through.of_keys(keys, parts[:, first:].view(num_parts, *v.shape), part_queries)
    return list(sum_parts(parts, k, v))


def _through_rows(
    query_grad: Tensor,
    attended_grad: Tensor,
    rows: Tensor,
    tensors: Tensors,
    needs: Sequence[bool],
    static: Static,
    found: list[Tensor | None],
) -> None:
    """From the gradients of the queries, and with `add_query_input` of the attention's result, to those of q."""
    q, norm_weight, norm_bias, query_weight, query_bias, statistics = (tensors[i] for i in (0, 5, 6, 7, 8, 10))
    assert q is not None
    grad = query_grad
    if query_weight is not None:
        found[7:9] = weight_gradient(query_grad, rows, query_weight, query_bias, static.dtype, needs[7:9])
        if needs[0] or needs[5] or needs[6] or needs[10]:
            grad = input_gradient(query_grad, query_weight, static.dtype, static.dtype)
    if static.add_query_input:
        grad = grad + attended_grad.to(static.dtype)
    wanted = [needs[0], needs[5], needs[6], needs[10]]
    if not any(wanted):
        return
    through = norm_gradient(static.norm, grad, q, norm_weight, norm_bias, statistics, static.norm_eps, wanted)
    found[0], found[5], found[6], found[10] = through
