"""Triton kernels of head_tokens: normalised rows with their means, then the head tokens that are made of those."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastvit_kernels.ops import library, triton_support
from fastvit_kernels.ops.head_tokens.reference import Static
from fastvit_kernels.ops.operator import Outputs, Tensors
from fastvit_kernels.ops.primitives import activate
from fastvit_kernels.ops.triton_configs import Config
from fastvit_kernels.ops.triton_linear import linear
from fastvit_kernels.ops.triton_normalization import row_normalize
from fastvit_kernels.ops.triton_specs import Empty, Spec
from fastvit_kernels.ops.triton_sums import split_rows


@triton.jit(do_not_specialize=["tokens", "out_tokens", "part_rows", "num_parts"])
def rows_kernel(
    x_ptr,
    norm,
    out_ptr,
    parts_ptr,
    tokens,
    out_tokens,
    part_rows,
    num_parts,
    channels,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """`part_rows` rows of a sample behind the LayerNorm, written where `out_ptr` is given, and their sum."""
    sample = (tl.program_id(0) // num_parts).to(tl.int64)
    first = tl.program_id(0) % num_parts * part_rows
    end = tl.minimum(first + part_rows, tokens)
    columns = tl.arange(0, BLOCK_N)
    column_mask = columns < channels
    sums = tl.zeros((BLOCK_N,), tl.float32)
    for start in range(first, end, BLOCK_M):
        rows = start + tl.arange(0, BLOCK_M)
        mask = (rows < end)[:, None] & column_mask[None, :]
        offsets = (sample * tokens + rows)[:, None] * channels + columns[None, :]
        x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        if norm is not None:
            x = row_normalize(x, norm, columns, column_mask, channels, BLOCK_N)
        sums += tl.sum(tl.where(mask, x, 0.0), 0)
        if out_ptr is not None:
            targets = (sample * out_tokens + rows)[:, None] * channels + columns[None, :]
            tl.store(out_ptr + targets, x, mask=mask)
    parts_ptr += tl.program_id(0).to(tl.int64) * channels
    tl.store(parts_ptr + columns, sums, mask=column_mask)


@triton.jit
def place_pieces(pieces, heads, tokens, out_tokens, width):
    """Where a head token's pieces begin in the result, and in the position embedding."""
    of_sample = pieces % (heads * heads)
    row = (pieces // (heads * heads)).to(tl.int64) * out_tokens + tokens + of_sample // heads
    return row * (heads * width) + of_sample % heads * width, of_sample * width


@triton.jit(do_not_specialize=["num_pieces", "tokens", "out_tokens", "heads"])
def pieces_kernel(
    projected_ptr,
    norm,
    position_ptr,
    out_ptr,
    num_pieces,
    tokens,
    out_tokens,
    heads,
    width,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """BLOCK_M pieces, `width` channels of a head token each: norm, activation and position embedding."""
    pieces = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.arange(0, BLOCK_N)
    mask = (pieces < num_pieces)[:, None] & (columns < width)[None, :]
    sources = pieces.to(tl.int64)[:, None] * width + columns[None, :]
    y = tl.load(projected_ptr + sources, mask=mask, other=0.0).to(tl.float32)
    y = activate(row_normalize(y, norm, columns, columns < width, width, BLOCK_N), "gelu")
    targets, positions = place_pieces(pieces, heads, tokens, out_tokens, width)
    position = tl.load(position_ptr + positions[:, None] + columns[None, :], mask=mask, other=0.0)
    tl.store(out_ptr + targets[:, None] + columns[None, :], y + position.to(tl.float32), mask=mask)


def whole_rows(kernel: str, width: int, device: torch.device) -> Config:
    """The configuration of a kernel whose tiles hold rows of `width` channels."""
    config = triton_support.config(kernel, triton_support.arithmetic(torch.float32, device), width)
    return config._replace(block_n=triton.next_power_of_2(width))


def means(tensors: Tensors, static: Static, out: Tensor | None) -> Tensor:
    """The mean `[B, h, C / h]` of the rows of x behind the norm; the rows themselves go into `out`."""
    x, weight, bias = tensors[:3]
    assert x is not None
    batch, tokens, channels = x.shape
    config = whole_rows("token_rows", channels, x.device)
    num_parts, part_rows = split_rows(tokens, config.block_m, max(batch, 1))
    parts = x.new_empty((batch, num_parts, channels), dtype=torch.float32)
    triton_support.launch(
        rows_kernel,
        batch * num_parts,
        x.device,
        config,
        x,
        None if static.norm_eps is None else (weight, bias, static.norm_eps),
        out,
        parts,
        tokens,
        0 if out is None else out.shape[1],
        part_rows,
        num_parts,
        channels,
    )
    return (parts.sum(1) / tokens).to(static.dtype).view(batch, static.num_heads, -1)


def run(tensors: Tensors, static: Static) -> Outputs:
    """The rows with their means; the linear; norm, activation and position embedding of the head tokens' pieces."""
    tensors = library.dense(tensors)
    x, _, _, weight, bias, head_norm_weight, head_norm_bias, pos_embed = tensors
    assert x is not None and weight is not None and pos_embed is not None
    batch, tokens, channels = x.shape
    heads = static.num_heads
    out = x.new_empty((batch, tokens + heads, channels), dtype=static.dtype)
    if batch == 0:
        return (out,)
    projected = linear(means(tensors, static, out), weight, bias, static.dtype)
    num_pieces, width = batch * heads * heads, channels // heads
    config = whole_rows("norm_gradient", width, x.device)
    triton_support.launch(
        pieces_kernel,
        triton.cdiv(num_pieces, config.block_m),
        x.device,
        config,
        projected,
        (head_norm_weight, head_norm_bias, static.head_norm_eps),
        pos_embed,
        out,
        num_pieces,
        tokens,
        tokens + heads,
        heads,
        width,
    )
    return (out,)


def _of_dhvt(empty: Empty) -> Outputs:
    """DHVT-Small for ImageNet."""
    tensors = [empty(8, 197, 384), empty(384), empty(384), empty(384, 48), empty(384), empty(48), empty(48)]
    return run([*tensors, empty(8, 384)], Static(8, 1e-6, 1e-5, empty.dtype))


SPECS = (Spec(rows_kernel, _of_dhvt), Spec(pieces_kernel, _of_dhvt))
