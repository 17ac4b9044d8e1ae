"""Gradients of local_attention in Triton: projections and norm around the attention's own."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fastvit_kernels.ops import library
from fastvit_kernels.ops.local_attention.reference import Static
from fastvit_kernels.ops.local_attention.triton_kernels import attend
from fastvit_kernels.ops.operator import Tensors
from fastvit_kernels.ops.triton_attention_gradients import Attention, AttentionGradients
from fastvit_kernels.ops.triton_gradients import input_gradient, weight_gradient
from fastvit_kernels.ops.triton_linear import linear
from fastvit_kernels.ops.triton_moments import group_statistics
from fastvit_kernels.ops.triton_norm_gradients import add_statistics_gradient, norm_gradient
from fastvit_kernels.ops.triton_normalization import normalize_rows


def run(grads: Sequence[Tensor], tensors: Tensors, needs: Sequence[bool], static: Static) -> list[Tensor]:
    """Queries, keys, values and where it is needed the attention again; then backwards, as far as is needed."""
    if grads[0].numel() == 0:
        return [torch.zeros_like(t) for t, needed in zip(tensors, needs, strict=True) if needed and t is not None]
    tensors = library.dense(tensors)
    x, k, v, norm_weight, norm_bias, statistics, qkv_weight, qkv_bias, bias, proj_weight, proj_bias, residual = tensors
    assert x is not None
    grad, dtype = grads[0].contiguous(), static.dtype
    found: list[Tensor | None] = [None] * len(tensors)
    rows = qkv = x
    whole = static
    if qkv_weight is not None:
        if static.norm != "none":
            rows = torch.empty_like(x, dtype=dtype)
            own = group_statistics(x) if static.norm == "group" and statistics is None else statistics
            normalize_rows(x, rows, norm_weight, norm_bias, static.norm_eps, statistics=own)
        # The bias reaches added pixels, too: they become pixels of the map.
        whole = _whole_windows(static) if static.pad == "zero" and qkv_bias is not None else static
        rows = _pad(rows, static, whole)
        qkv = linear(rows, qkv_weight, qkv_bias, dtype)
    attended = None
    if static.return_statistics or (needs[9] and proj_weight is not None):
        attended, _ = attend(qkv, k, v, None, bias, None, whole)
        attended = _crop(attended, static, whole)
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
        operand = grad if attended is None else attended
        found[9:11] = weight_gradient(grad, operand, proj_weight, proj_bias, dtype, needs[9:11])
        grad = input_gradient(grad, proj_weight, dtype, dtype)
    if any(needs[:9]):
        grad = _pad(grad, static, whole)
        grads_of_rows = [torch.empty_like(t) for t in (qkv, k, v) if t is not None]
        q, k, v = qkv.chunk(3, dim=-1) if k is None or v is None else (qkv, k, v)
        attention = Attention(
            *(q, k, v, grad, bias, static.num_heads, static.scale, dtype),
            *(static.window_size, whole.height, whole.width, static.pad == "mask"),
        )
        through = AttentionGradients(attention)
        if needs[8] and bias is not None:
            found[8] = through.of_bias()
        q_grad, k_grad, v_grad = grads_of_rows[0].chunk(3, dim=-1) if len(grads_of_rows) == 1 else grads_of_rows
        if any(needs[:1]) or any(needs[3:8]):
            through.of_queries(q_grad)
        if len(grads_of_rows) == 1 or needs[1] or needs[2]:
            through.of_keys(k_grad, v_grad)
        found[: len(grads_of_rows)] = grads_of_rows
        if qkv_weight is not None:
            found[6:8] = weight_gradient(grads_of_rows[0], rows, qkv_weight, qkv_bias, dtype, needs[6:8])
            if needs[0] or any(needs[3:6]):
                grad = _crop(input_gradient(grads_of_rows[0], qkv_weight, dtype, dtype), static, whole)
                wanted = [needs[0], *needs[3:6]]
                affine = norm_weight, norm_bias, statistics
                found[0], *found[3:6] = norm_gradient(static.norm, grad, x, *affine, static.norm_eps, wanted)
    return [g for g, needed in zip(found, needs, strict=True) if needed and g is not None]


def _whole_windows(static: Static) -> Static:
    """The same attention on the map with the pixels that fill up its last windows."""
    window = static.window_size
    height, width = (side + -side % window for side in (static.height, static.width))
    return static._replace(height=height, width=width)


def _pad(rows: Tensor, static: Static, whole: Static) -> Tensor:
    """Rows of the map with zeros at the pixels that `whole` has more."""
    if (whole.height, whole.width) == (static.height, static.width):
        return rows
    maps = rows.unflatten(1, (static.height, static.width))
    return F.pad(maps, (0, 0, 0, whole.width - static.width, 0, whole.height - static.height)).flatten(1, 2)


def _crop(rows: Tensor, static: Static, whole: Static) -> Tensor:
    """The inverse of `_pad`."""
    if (whole.height, whole.width) == (static.height, static.width):
        return rows
    maps = rows.unflatten(1, (whole.height, whole.width))
    return maps[:, : static.height, : static.width].flatten(1, 2)
