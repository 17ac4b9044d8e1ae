"""Attention of every query against one key/value set, short or long."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastvit_kernels.ops import library
from fastvit_kernels.ops.arguments import (
    check_activation_tensor,
    check_device,
    check_flag,
    check_integer,
    check_norm_kind,
    check_number,
    check_parameter,
    check_residual,
    check_tensor,
    compute_dtype,
    short,
)
from fastvit_kernels.ops.global_attention import native, sdpa, triton
from fastvit_kernels.ops.global_attention.reference import STATIC_SCHEMA, Static, reference
from fastvit_kernels.ops.operator import Operator, Outputs, Tensors
from fastvit_kernels.ops.packing import PackedWeights
from fastvit_kernels.ops.precision import wide

__all__ = ["global_attention"]


def _fake(tensors: Tensors, static: Static) -> Outputs:
    q, k, v, proj_weight, residual = tensors[0], tensors[1], tensors[2], tensors[3], tensors[11]
    assert q is not None and k is not None
    width = v.shape[-1] if v is not None else k.shape[-1] // 2
    width = width if proj_weight is None else proj_weight.shape[0]
    dtype = static.dtype if residual is None else torch.promote_types(residual.dtype, static.dtype)
    summary = (q.shape[0], 2) if static.return_statistics else (0,)
    return q.new_empty((q.shape[0], q.shape[1], width), dtype=dtype), q.new_empty(summary, dtype=wide(dtype))


OPERATOR = Operator(
    name="global_attention",
    static=Static,
    static_schema=STATIC_SCHEMA,
    parameters=tuple(range(3, 10)),
    returns=2,
    any_layout=(0, 1, 2),
    reference=reference,
    fake=_fake,
    packing=lambda s: (s.num_heads, s.norm),
    residual=11,
    residual_in_all=lambda s: s.return_statistics,
    backends=[native.Cpu(), triton.Triton(), sdpa.Sdpa()],
)
library.register(OPERATOR, triton.launch, triton.launch_backward, sdpa.compose)


def global_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor | None = None,
    *,
    num_heads: int,
    scale: float,
    norm: str | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    norm_eps: float | None = None,
    norm_statistics: Tensor | None = None,
    query_weight: Tensor | None = None,
    query_bias: Tensor | None = None,
    add_query_input: bool = False,
    attn_bias: Tensor | None = None,
    proj_weight: Tensor | None = None,
    proj_bias: Tensor | None = None,
    residual: Tensor | None = None,
    return_statistics: bool = False,
    packed: PackedWeights | None = None,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Multi-head attention from token rows, with norm and query projection in front, output projection and residual.

    Equivalent plain PyTorch::

        rows = F.layer_norm(q, (C_in,), norm_weight, norm_bias, norm_eps)
        q = F.linear(rows, query_weight, query_bias)
        q, k, v = (t.unflatten(-1, (num_heads, -1)).transpose(1, 2) for t in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, attn_bias, scale=scale).transpose(1, 2).flatten(2)
        out = residual + F.linear(out + rows if add_query_input else out, proj_weight, proj_bias)

    Args:
        q: `[B, N, C]`, heads side by side in the channels: channel `h * d + i` is element i of head h. With a
            `query_weight` `[B, N, C_in]`, which the queries are made from.
        k: `[B, M, C]`; without `v` keys and values in one, `[B, M, 2 C]`, keys first.
        v: `[B, M, C_v]`; the same number of heads, `C_v / num_heads` wide; None when `k` holds the values too.
        num_heads: h; divides C and C_v.
        scale: factor on the scores. There is no default: CvT uses `C ** -0.5`, most others `(C / h) ** -0.5`.
        norm: of the rows of q: `"layer"` (LayerNorm), `"group"` (GroupNorm with one group over all rows and channels of
            a sample) or None. Computed in at least fp32.
        norm_weight, norm_bias: `[C_in]` or None.
        norm_eps: the norm's epsilon.
        norm_statistics: for `"group"`, the mean and biased variance of each sample `[B, 2]`, as a previous operator
            returned them; None to compute them here.
        query_weight: `[C, C_in]`, or None for none.
        query_bias: `[C]`, or None.
        add_query_input: add the (normalised) rows of q to the attention's output, in front of the output projection.
        attn_bias: added to the scaled scores of every sample, `[num_heads, N, M]`, or None.
        proj_weight: output projection `[C_out, C_v]`, or None for none.
        proj_bias: `[C_out]`, or None.
        residual: added to the result, `[B, N, C_out]` (`C_v` without a projection), or None.
        return_statistics: also return mean and biased variance of each sample of the result.
        packed: keeps the weights in the layout of the CPU kernels from call to call and repacks them when they change.
        backend: runs this call on one backend; see `use_backend`.

    Returns:
        `[B, N, C_out]` (`C_v` without a projection), in q's dtype or autocast's, promoted with the residual's; with
        `return_statistics` also `[B, 2]` in at least fp32.

    Raises:
        TypeError, ValueError: naming the argument, what came and what was expected.
        BackendError: the chosen backend cannot run the call.

    Source: Vaswani et al., "Attention Is All You Need", section 3.2; the `"group"` norm and `add_query_input` are the
    global half of Liu et al., "Vision Transformers with Hierarchical Attention", section 3.2.
    """
    check_activation_tensor("q", q, 3)
    check_integer("num_heads", num_heads, 1)
    for name, tensor in (("k", k), ("v", v)) if v is not None else (("k", k),):
        check_activation_tensor(name, tensor, 3)
        if tensor.dtype is not q.dtype and not _from_autocast(tensor, q):
            raise TypeError(f"{name}: expected {short(q.dtype)} like q, got {short(tensor.dtype)}")
        check_device(name, tensor, q)
        if tensor.shape[0] != q.shape[0] or tensor.shape[1] != k.shape[1]:
            raise ValueError(f"{name}: expected batch {q.shape[0]} and {k.shape[1]} rows, got {tuple(tensor.shape)}")
    channels = q.shape[2]
    if query_weight is not None:
        channels = check_tensor("query_weight", query_weight, "[C, C_in]").shape[0]
        check_parameter("query_weight", query_weight, (channels, q.shape[2]), q)
    elif query_bias is not None:
        raise ValueError("query_bias: expected a query_weight beside it, got None")
    check_parameter("query_bias", query_bias, (channels,), q, optional=True)
    kind, norm_eps = check_norm_kind(norm, norm_weight, norm_bias, norm_eps, norm_statistics, q)
    expected, value_width = (channels, v.shape[2]) if v is not None else (2 * channels, channels)
    if k.shape[2] != expected:
        raise ValueError(f"k: expected {expected} channels for queries of {channels}, got {k.shape[2]}")
    if k.shape[1] < 1:
        raise ValueError("k: expected at least one key, got none")
    if channels % num_heads or value_width % num_heads:
        raise ValueError(f"num_heads: {num_heads} does not divide {channels} and {value_width} channels")
    scale = check_number("scale", scale, -math.inf, math.inf)
    check_flag("add_query_input", add_query_input)
    check_flag("return_statistics", return_statistics)
    if add_query_input and q.shape[2] != value_width:
        raise ValueError(f"add_query_input: q has {q.shape[2]} channels, the values have {value_width}")
    check_parameter("attn_bias", attn_bias, (num_heads, q.shape[1], k.shape[1]), q, optional=True)
    out = value_width
    if proj_weight is not None:
        out = check_tensor("proj_weight", proj_weight, "[C_out, C_v]").shape[0]
        check_parameter("proj_weight", proj_weight, (out, value_width), q)
    elif proj_bias is not None:
        raise ValueError("proj_bias: expected a proj_weight beside it, got None")
    check_parameter("proj_bias", proj_bias, (out,), q, optional=True)
    if residual is not None:
        check_residual(residual, (q.shape[0], q.shape[1], out), q)
    tensors = [q, k, v, proj_weight, proj_bias, norm_weight, norm_bias, query_weight, query_bias, attn_bias]
    tensors += [norm_statistics, residual]
    static = Static(num_heads, scale, kind, norm_eps, add_query_input, return_statistics, compute_dtype(q))
    result, statistics = library.call(OPERATOR, tensors, static, packed=packed, backend=backend)
    return (result, statistics) if return_statistics else result


def _from_autocast(tensor: Tensor, q: Tensor) -> bool:
    """Whether a key or value comes from a product under autocast, while the rows that make the queries do not."""
    return tensor.dtype is compute_dtype(q)
