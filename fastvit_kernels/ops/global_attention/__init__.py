"""Attention of every query against one key/value set, short or long."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastvit_kernels.ops import library
from fastvit_kernels.ops.arguments import (
    check_activation_tensor,
    check_device,
    check_integer,
    check_number,
    check_parameter,
    check_residual,
    check_tensor,
    compute_dtype,
    short,
)
from fastvit_kernels.ops.global_attention import native, triton
from fastvit_kernels.ops.global_attention.reference import STATIC_SCHEMA, Static, reference
from fastvit_kernels.ops.operator import Operator, Outputs, Tensors
from fastvit_kernels.ops.packing import PackedWeights

__all__ = ["global_attention"]


def _fake(tensors: Tensors, static: Static) -> Outputs:
    q, _, v, proj_weight, _, residual = tensors
    assert q is not None and v is not None
    width = v.shape[-1] if proj_weight is None else proj_weight.shape[0]
    dtype = static.dtype if residual is None else torch.promote_types(residual.dtype, static.dtype)
    return (q.new_empty((q.shape[0], q.shape[1], width), dtype=dtype),)


OPERATOR = Operator(
    name="global_attention",
    static=Static,
    static_schema=STATIC_SCHEMA,
    parameters=(3, 4),
    returns=1,
    reference=reference,
    fake=_fake,
    backends=[native.Cpu(), triton.Triton()],
)
library.register(OPERATOR, triton.launch)


def global_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    num_heads: int,
    scale: float,
    proj_weight: Tensor | None = None,
    proj_bias: Tensor | None = None,
    residual: Tensor | None = None,
    packed: PackedWeights | None = None,
    backend: str | None = None,
) -> Tensor:
    """Multi-head attention from token rows, with the output projection and the residual fused behind it.

    Equivalent plain PyTorch::

        q, k, v = (t.unflatten(-1, (num_heads, -1)).transpose(1, 2) for t in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2).flatten(2)
        out = residual + F.linear(out, proj_weight, proj_bias)

    Args:
        q: `[B, N, C]`, heads side by side in the channels: channel `h * d + i` is element i of head h.
        k: `[B, M, C]`.
        v: `[B, M, C_v]`; the same number of heads, `C_v / num_heads` wide.
        num_heads: h; divides C and C_v.
        scale: factor on the scores. There is no default: CvT uses `C ** -0.5`, most others `(C / h) ** -0.5`.
        proj_weight: output projection `[C_out, C_v]`, or None for none.
        proj_bias: `[C_out]`, or None.
        residual: added to the result, `[B, N, C_out]` (`C_v` without a projection), or None.
        packed: keeps the weights in the layout of the CPU kernels from call to call and repacks them when they change.
        backend: runs this call on one backend; see `use_backend`.

    Returns:
        `[B, N, C_out]` (`C_v` without a projection), in q's dtype or autocast's, promoted with the residual's.

    Raises:
        TypeError, ValueError: naming the argument, what came and what was expected.
        BackendError: the chosen backend cannot run the call.

    Source: Vaswani et al., "Attention Is All You Need", section 3.2.
    """
    check_activation_tensor("q", q, 3)
    for name, tensor in (("k", k), ("v", v)):
        check_activation_tensor(name, tensor, 3)
        if tensor.dtype is not q.dtype:
            raise TypeError(f"{name}: expected {short(q.dtype)} like q, got {short(tensor.dtype)}")
        check_device(name, tensor, q)
        if tensor.shape[0] != q.shape[0] or tensor.shape[1] != k.shape[1]:
            raise ValueError(f"{name}: expected batch {q.shape[0]} and {k.shape[1]} rows, got {tuple(tensor.shape)}")
    if k.shape[2] != q.shape[2]:
        raise ValueError(f"k: expected {q.shape[2]} channels like q, got {k.shape[2]}")
    if k.shape[1] < 1:
        raise ValueError("k: expected at least one key, got none")
    check_integer("num_heads", num_heads, 1)
    if q.shape[2] % num_heads or v.shape[2] % num_heads:
        raise ValueError(f"num_heads: {num_heads} does not divide {q.shape[2]} and {v.shape[2]} channels")
    scale = check_number("scale", scale, -math.inf, math.inf)
    out = v.shape[2]
    if proj_weight is not None:
        out = check_tensor("proj_weight", proj_weight, "[C_out, C_v]").shape[0]
        check_parameter("proj_weight", proj_weight, (out, v.shape[2]), q)
    elif proj_bias is not None:
        raise ValueError("proj_bias: expected a proj_weight beside it, got None")
    check_parameter("proj_bias", proj_bias, (out,), q, optional=True)
    if residual is not None:
        check_residual(residual, (q.shape[0], q.shape[1], out), q)
    tensors = [q, k, v, proj_weight, proj_bias, residual]
    static = Static(num_heads, scale, compute_dtype(q))
    return library.call(OPERATOR, tensors, static, packed=packed, backend=backend)[0]
