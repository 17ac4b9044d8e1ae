"""Attention inside square windows of a map, straight from its tokens."""

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
    check_map,
    check_norm_kind,
    check_number,
    check_parameter,
    check_residual,
    check_tensor,
    compute_dtype,
    short,
)
from fastvit_kernels.ops.local_attention import native, sdpa, triton
from fastvit_kernels.ops.local_attention.reference import STATIC_SCHEMA, Static, reference
from fastvit_kernels.ops.operator import Operator, Outputs, Tensors
from fastvit_kernels.ops.packing import PackedWeights
from fastvit_kernels.ops.precision import wide

__all__ = ["local_attention"]

PADS = ("none", "mask", "zero")
# Its fourth power is the number of scores of a window.
LARGEST_WINDOW = 4096


def _fake(tensors: Tensors, static: Static) -> Outputs:
    x, v, qkv_weight, proj_weight, residual = (tensors[index] for index in (0, 2, 6, 9, 11))
    assert x is not None
    if proj_weight is not None:
        width = proj_weight.shape[0]
    elif v is not None:
        width = v.shape[-1]
    else:
        width = (x.shape[-1] if qkv_weight is None else qkv_weight.shape[0]) // 3
    dtype = static.dtype if residual is None else torch.promote_types(residual.dtype, static.dtype)
    summary = (x.shape[0], 2) if static.return_statistics else (0,)
    return x.new_empty((*x.shape[:2], width), dtype=dtype), x.new_empty(summary, dtype=wide(dtype))


OPERATOR = Operator(
    name="local_attention",
    static=Static,
    static_schema=STATIC_SCHEMA,
    parameters=(3, 4, 6, 7, 8, 9, 10),
    returns=2,
    reference=reference,
    fake=_fake,
    packing=lambda s: (s.num_heads, s.norm),
    residual=11,
    residual_in_all=lambda s: s.return_statistics,
    backends=[native.Cpu(), triton.Triton(), native.Cuda(), sdpa.Sdpa()],
)
library.register(OPERATOR, triton.launch, triton.launch_backward, sdpa.compose)


def local_attention(
    x: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    *,
    grid: tuple[int, int],
    window_size: int,
    num_heads: int,
    scale: float,
    norm: str | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    norm_eps: float | None = None,
    norm_statistics: Tensor | None = None,
    qkv_weight: Tensor | None = None,
    qkv_bias: Tensor | None = None,
    attn_bias: Tensor | None = None,
    proj_weight: Tensor | None = None,
    proj_bias: Tensor | None = None,
    residual: Tensor | None = None,
    pad: str = "none",
    return_statistics: bool = False,
    packed: PackedWeights | None = None,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Multi-head attention inside windows of g x g pixels, with norm and projection in front, projection and residual.

    Equivalent plain PyTorch, where `windows` cuts `[B, H*W, C]` tokens into contiguous windows `[B * n, g*g, C]`
    without overlap, and `unwindows` puts them back::

        rows = windows(F.layer_norm(x, (C_in,), norm_weight, norm_bias, norm_eps))
        q, k, v = F.linear(rows, qkv_weight, qkv_bias).chunk(3, -1)
        q, k, v = (t.unflatten(-1, (num_heads, -1)).transpose(1, 2) for t in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, attn_bias, scale=scale).transpose(1, 2).flatten(2)
        out = residual + F.linear(unwindows(out), proj_weight, proj_bias)

    Args:
        x: tokens of a map, row-major, fp64, fp32, bf16 or fp16. One of

            * `[B, H*W, C_in]` beside a `qkv_weight`: what queries, keys and values are made from;
            * `[B, H*W, 3 C]` alone: queries, keys and values side by side;
            * `[B, H*W, C]` beside `k` and `v`: the queries.

            Heads lie side by side in the C channels: channel `h * d + i` is element i of head h.
        k: `[B, H*W, C]`, or None.
        v: `[B, H*W, C_v]`; the same number of heads, `C_v / num_heads` wide; or None. Otherwise C_v is C.
        grid: `(H, W)`.
        window_size: g, the side of a window in pixels, at most 4096. Where `pad="mask"` and no `attn_bias` of a fixed
            size is given, it may be larger than the map at no cost.
        num_heads: h; divides C and C_v.
        scale: factor on the scores; there is no default.
        norm: of x in front of `qkv_weight`: `"layer"` (LayerNorm), `"group"` (GroupNorm with one group over all pixels
            and channels of a sample) or None. Computed in at least fp32.
        norm_weight, norm_bias: `[C_in]` or None; fp32 or x's dtype, like all parameters.
        norm_eps: the norm's epsilon.
        norm_statistics: for `"group"`, the mean and biased variance of each sample `[B, 2]`, as a previous operator
            returned them; None to compute them here.
        qkv_weight: `[3 C, C_in]`, queries first, then keys, then values; or None.
        qkv_bias: `[3 C]`, or None.
        attn_bias: added to the scaled scores of every window, `[num_heads, g*g, g*g]`, or None.
        proj_weight: output projection `[C_out, C_v]`, or None for none.
        proj_bias: `[C_out]`, or None.
        residual: added to the result, `[B, H*W, C_out]` (`C_v` without a projection), or None.
        pad: for sides that are no multiples of g, on the right and at the bottom: `"none"` refuses them; `"mask"` keeps
            the added pixels out of the softmax; `"zero"` adds pixels that are zero behind the norm and in front of
            `qkv_weight`, and that take part as keys (with a `qkv_bias`, their keys and values are what it holds).
        return_statistics: also return mean and biased variance of each sample of the result.
        packed: keeps the weights in the layout of the CPU kernels from call to call and repacks them when they change.
        backend: runs this call on one backend; see `use_backend`.

    Returns:
        `[B, H*W, C_out]` (`C_v` without a projection), in x's dtype or autocast's, promoted with the residual's; with
        `return_statistics` also `[B, 2]` in at least fp32.

    Raises:
        TypeError, ValueError: naming the argument, what came and what was expected.
        BackendError: the chosen backend cannot run the call.

    Source: Liu et al., "Vision Transformers with Hierarchical Attention", section 3.2 (the local half); Chu et al.,
    "Twins", section 3.2 (`pad="zero"`); Liu et al., "Swin Transformer", section 3.2 (`attn_bias`).
    """
    check_activation_tensor("x", x, 3)
    height, width = check_map(grid, x)
    check_integer("window_size", window_size, 1)
    if pad not in PADS:
        raise ValueError(f"pad: expected one of {', '.join(PADS)}, got {pad!r}")
    if pad == "mask" and attn_bias is None and window_size > max(height, width):
        # Masked pixels change nothing but the work, which grows with the square of the window's area.
        window_size = max(height, width)
    if window_size > LARGEST_WINDOW:
        raise ValueError(f"window_size: expected an integer of at most {LARGEST_WINDOW}, got {window_size}")
    if height % window_size == 0 and width % window_size == 0:
        pad = "none"
    elif pad == "none":
        raise ValueError(
            f"grid: expected multiples of the window_size {window_size}, got {height} x {width}; "
            'pad="mask" or pad="zero" take any'
        )
    channels, value_channels = _check_inputs(x, k, v, qkv_weight, qkv_bias)
    if norm is not None and qkv_weight is None:
        raise ValueError(f"norm: expected None without a qkv_weight behind it, got {norm!r}")
    kind, norm_eps = check_norm_kind(norm, norm_weight, norm_bias, norm_eps, norm_statistics, x)
    check_integer("num_heads", num_heads, 1)
    if channels % num_heads or value_channels % num_heads:
        raise ValueError(f"num_heads: {num_heads} does not divide {channels} and {value_channels} channels")
    scale = check_number("scale", scale, -math.inf, math.inf)
    check_flag("return_statistics", return_statistics)
    pixels = window_size * window_size
    check_parameter("attn_bias", attn_bias, (num_heads, pixels, pixels), x, optional=True)
    out = value_channels
    if proj_weight is not None:
        out = check_tensor("proj_weight", proj_weight, "[C_out, C_v]").shape[0]
        check_parameter("proj_weight", proj_weight, (out, value_channels), x)
    elif proj_bias is not None:
        raise ValueError("proj_bias: expected a proj_weight beside it, got None")
    check_parameter("proj_bias", proj_bias, (out,), x, optional=True)
    if residual is not None:
        check_residual(residual, (*x.shape[:2], out), x)
    tensors = [x, k, v, norm_weight, norm_bias, norm_statistics, qkv_weight, qkv_bias, attn_bias]
    tensors += [proj_weight, proj_bias, residual]
    static = Static(
        kind, norm_eps, height, width, window_size, num_heads, scale, pad, return_statistics, compute_dtype(x)
    )
    result, statistics = library.call(OPERATOR, tensors, static, packed=packed, backend=backend)
    return (result, statistics) if return_statistics else result


def _check_inputs(
    x: Tensor, k: Tensor | None, v: Tensor | None, qkv_weight: Tensor | None, qkv_bias: Tensor | None
) -> tuple[int, int]:
    """The channels of the queries and of the values."""
    if qkv_weight is not None:
        for name, tensor in (("k", k), ("v", v)):
            if tensor is not None:
                raise ValueError(f"{name}: expected None beside a qkv_weight, which makes keys and values of x")
        rows = check_tensor("qkv_weight", qkv_weight, "[3 C, C_in]").shape[0]
        if rows % 3:
            raise ValueError(f"qkv_weight: expected [3 C, C_in], got {rows} rows, which 3 does not divide")
        check_parameter("qkv_weight", qkv_weight, (rows, x.shape[2]), x)
        check_parameter("qkv_bias", qkv_bias, (rows,), x, optional=True)
        return rows // 3, rows // 3
    if qkv_bias is not None:
        raise ValueError("qkv_bias: expected a qkv_weight beside it, got None")
    if k is None and v is None:
        if x.shape[2] % 3:
            raise ValueError(f"x: expected [B, H*W, 3 C] without k, v and qkv_weight, got shape {tuple(x.shape)}")
        return x.shape[2] // 3, x.shape[2] // 3
    for name, tensor in (("k", k), ("v", v)):
        check_activation_tensor(name, tensor, 3)
        assert tensor is not None
        if tensor.dtype is not x.dtype:
            raise TypeError(f"{name}: expected {short(x.dtype)} like x, got {short(tensor.dtype)}")
        check_device(name, tensor, x)
        if tensor.shape[:2] != x.shape[:2]:
            raise ValueError(f"{name}: expected batch {x.shape[0]} and {x.shape[1]} rows, got {tuple(tensor.shape)}")
    assert k is not None and v is not None
    if k.shape[2] != x.shape[2]:
        raise ValueError(f"k: expected {x.shape[2]} channels like x, got {k.shape[2]}")
    return x.shape[2], v.shape[2]
