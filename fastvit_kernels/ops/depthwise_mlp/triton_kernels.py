"""Triton kernels of depthwise_mlp: the hidden map is written by one launch and read by another."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastvit_kernels.ops import library, triton_support
from fastvit_kernels.ops.depthwise_mlp.reference import BATCH_NORMS, Static
from fastvit_kernels.ops.normalization import group_normalize
from fastvit_kernels.ops.operator import Outputs, Tensors
from fastvit_kernels.ops.primitives import activate, batch_normalize, dot, fold_filter, scale_and_shift, vector
from fastvit_kernels.ops.triton_configs import ALIGNMENT
from fastvit_kernels.ops.triton_linear import linear_tile
from fastvit_kernels.ops.triton_moments import group_statistics
from fastvit_kernels.ops.triton_normalization import normalize_rows
from fastvit_kernels.ops.triton_specs import Empty, Spec


@triton.jit
def copy_tile(tile, source_ptr, padded_ptr, num_rows, columns, stride, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """BLOCK_M times BLOCK_N elements of a matrix, in another dtype, its rows padded with zeros to `stride`."""
    tiles = tl.cdiv(stride, BLOCK_N)
    row = (tile // tiles * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)[:, None]
    column = (tile % tiles * BLOCK_N + tl.arange(0, BLOCK_N))[None, :]
    inside = row < num_rows
    values = tl.load(source_ptr + row * columns + column, mask=inside & (column < columns), other=0.0)
    tl.store(padded_ptr + row * stride + column, values.to(tl.float32), mask=inside & (column < stride))


@triton.jit(do_not_specialize=["num_rows", "rows_of_sample"])
def expand_kernel(
    x_ptr,
    norm,
    weight_ptr,
    bias_ptr,
    bn1,
    filter,
    bn2,
    folded_ptr,
    project_ptr,
    padded_ptr,
    hidden_ptr,
    num_rows,
    channels,
    hidden_channels,
    hidden_stride,
    out_channels,
    rows_of_sample,
    TAPS: tl.constexpr,
    ADDS_INPUT: tl.constexpr,
    PREFIX: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BN_AFTER_ACTIVATION: tl.constexpr,
    EVEN_K: tl.constexpr,
    ARITHMETIC: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The first programs fold the filter, BLOCK_N channels each; the next copy the weight of the second linear where it
    is not yet as `project_kernel` reads it; the others make tiles of the hidden map.

    `bn2` scales the filter where it stands right behind the convolution; otherwise its scale and shift make two more
    rows of the folded filter.
    """
    program = tl.program_id(0)
    blocks = tl.cdiv(hidden_stride, BLOCK_N)
    copies = 0
    if padded_ptr is not None:
        copies = blocks * tl.cdiv(out_channels, BLOCK_M)
    if program < blocks:
        PLUS: tl.constexpr = 1.0 if ADDS_INPUT else 0.0
        if BN_AFTER_ACTIVATION:
            fold_filter(
                *(program, filter, (None, None, None, None, None), folded_ptr, hidden_channels, hidden_stride),
                *(TAPS, PLUS, BLOCK_N),
            )
            columns = program * BLOCK_N + tl.arange(0, BLOCK_N)
            scale, shift = scale_and_shift(bn2, columns, columns < hidden_channels, BLOCK_N)
            row = folded_ptr + (TAPS + 1) * hidden_stride + columns
            tl.store(row, scale, mask=columns < hidden_stride)
            tl.store(row + hidden_stride, shift, mask=columns < hidden_stride)
        else:
            fold_filter(program, filter, bn2, folded_ptr, hidden_channels, hidden_stride, TAPS, PLUS, BLOCK_N)
    elif program < blocks + copies:
        if padded_ptr is not None:
            copy_tile(
                *(program - blocks, project_ptr, padded_ptr, out_channels, hidden_channels, hidden_stride),
                *(BLOCK_M, BLOCK_N),
            )
    else:
        linear_tile(
            *(program - blocks - copies, x_ptr, norm, weight_ptr, bias_ptr, bn1, None, None, hidden_ptr),
            *(num_rows, channels, hidden_channels, hidden_stride, rows_of_sample),
            *(PREFIX, ACTIVATION, BN_AFTER_ACTIVATION, EVEN_K, ARITHMETIC, BLOCK_M, BLOCK_N, BLOCK_K),
        )


@triton.jit(do_not_specialize=["height", "width", "run_rows", "strip_width"])
def project_kernel(
    hidden_ptr,
    folded_ptr,
    weight_ptr,
    bias_ptr,
    bn3,
    residual_ptr,
    out_ptr,
    means_ptr,
    height,
    width,
    run_rows,
    strip_width,
    hidden_stride,
    out_channels,
    KERNEL: tl.constexpr,
    PREFIX: tl.constexpr,
    ACTIVATION: tl.constexpr,
    SCALED: tl.constexpr,
    ADDS_INPUT: tl.constexpr,
    EVEN_K: tl.constexpr,
    ARITHMETIC: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """BLOCK_M pixels and BLOCK_N output channels; the hidden pixels are convolved on the way into the product.

    `run_rows` rows of the map, of one image or of many below each other, make a run, which is cut into vertical strips
    of `strip_width` columns. A tile is BLOCK_M pixels of a strip, row by row: about square, so that most pixels around
    it are its own.
    """
    AT_ONCE: tl.constexpr = KERNEL if KERNEL <= 3 else 1
    # Programs that share pixels are neighbours.
    column_tiles = tl.cdiv(out_channels, BLOCK_N)
    columns = tl.program_id(0) % column_tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    column_mask = columns < out_channels
    tile = tl.program_id(0) // column_tiles
    tiles = tl.cdiv(run_rows * strip_width, BLOCK_M)
    strips = tl.cdiv(width, strip_width)
    pixel = tile % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    row = pixel // strip_width
    x = tile // tiles % strips * strip_width + pixel % strip_width
    inside = (row < run_rows) & (x < width)
    row += tile // tiles // strips * run_rows
    y = row % height
    pixels = row.to(tl.int64) * width + x
    hidden_rows = hidden_ptr + pixels[:, None] * hidden_stride
    weight_columns = weight_ptr + columns.to(tl.int64)[None, :] * hidden_stride
    accumulator = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, hidden_stride, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        # Hidden map, filter and weight go on to `hidden_stride`, with zeros.
        k_mask = k < hidden_stride
        # Asked for before the taps, to arrive while they are summed.
        if EVEN_K:
            weight = tl.load(weight_columns + k[:, None], mask=column_mask[None, :], other=0.0)
        else:
            weight = tl.load(weight_columns + k[:, None], mask=k_mask[:, None] & column_mask[None, :], other=0.0)
        values = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
        # A row of a 3 x 3 filter is in flight at a time, of larger ones a tap: more would spill registers.
        for first in range(0, KERNEL * KERNEL, AT_ONCE):
            for other in tl.static_range(AT_ONCE):
                tap = first + other
                off_y = tap // KERNEL - KERNEL // 2
                off_x = tap % KERNEL - KERNEL // 2
                there = inside & (y + off_y >= 0) & (y + off_y < height) & (x + off_x >= 0) & (x + off_x < width)
                source = hidden_rows + (off_y * width + off_x).to(tl.int64) * hidden_stride
                hidden = tl.load(source + k[None, :], mask=there[:, None] & k_mask[None, :], other=0.0)
                weight_of_tap = tl.load(folded_ptr + tap * hidden_stride + k, mask=k_mask, other=0.0)
                values += hidden.to(tl.float32) * weight_of_tap[None, :]
        last = folded_ptr + KERNEL * KERNEL * hidden_stride + k
        values = activate(values + tl.load(last, mask=k_mask, other=0.0)[None, :], ACTIVATION)
        if SCALED:
            values *= tl.load(last + hidden_stride, mask=k_mask, other=0.0)[None, :]
            values += tl.load(last + 2 * hidden_stride, mask=k_mask, other=0.0)[None, :]
        if ADDS_INPUT:
            mask = inside[:, None] & k_mask[None, :]
            values += tl.load(hidden_rows + k[None, :], mask=mask, other=0.0).to(tl.float32)
        accumulator = dot(values, weight, accumulator, ARITHMETIC)
    z = accumulator + vector(bias_ptr, columns, column_mask, 0.0, BLOCK_N)[None, :]
    z = batch_normalize(z, bn3, columns, column_mask, BLOCK_N)
    if means_ptr is not None:
        means = tl.sum(tl.where(inside[:, None], z, 0.0), 0) / (height * width)
        tl.store(means_ptr + tile.to(tl.int64) * out_channels + columns, means, mask=column_mask)
    offsets = (pixels + (row // height + 1) * PREFIX)[:, None] * out_channels + columns[None, :]
    mask = inside[:, None] & column_mask[None, :]
    if residual_ptr is not None:
        z += tl.load(residual_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + offsets, z, mask=mask)


class Hidden(NamedTuple):
    """What the first launch leaves to the second, channels padded with zeros to rows that vector loads like.

    Attributes:
        rows: the hidden map `[B, H*W, C_hidden]`.
        filter: the folded filter, and behind it a shift and, of a `bn2` behind the activation, a scale and a shift.
        weight: of the second linear `[C_out, C_hidden]`, in the compute dtype.
    """

    rows: Tensor
    filter: Tensor
    weight: Tensor


def run(tensors: Tensors, static: Static) -> Outputs:
    """The hidden map with the folded filter; the result; behind them a GroupNorm, the prefix rows and the summary.

    The hidden map goes through memory: kept on chip, a tile would need the hidden pixels around it, and all of both
    weights.
    """
    tensors = library.dense(tensors)
    x, fc2_weight, residual = tensors[0], tensors[16], tensors[24]
    assert x is not None and fc2_weight is not None
    prefix, out_channels = static.num_prefix_tokens, fc2_weight.shape[0]
    dtype = static.dtype if residual is None else torch.promote_types(residual.dtype, static.dtype)
    out = x.new_empty((*x.shape[:2], out_channels), dtype=dtype)
    hidden = _expand(tensors, static)
    if static.out_norm_eps is None:
        means = _project(tensors, static, hidden, residual, out, prefix)
    else:
        weight, bias = tensors[22:24]
        z = x.new_empty((x.shape[0], static.height * static.width, out_channels), dtype=static.dtype)
        means = _project(tensors, static, hidden, None, z, 0)
        moments = group_statistics(z)
        normalize_rows(
            *(z, out, weight, bias, static.out_norm_eps),
            statistics=moments,
            residual=residual,
            num_prefix_tokens=prefix,
        )
        if means is not None:
            means = group_normalize(means[:, None], moments, weight, bias, static.out_norm_eps, means.dtype)[:, 0]
    if prefix:
        if residual is None:
            out[:, :prefix].zero_()
        else:
            out[:, :prefix].copy_(residual[:, :prefix])
    if static.summary == "statistics":
        return out, group_statistics(out, prefix)
    return out, x.new_empty(0, dtype=torch.float32) if means is None else means


def _batch_norm(tensors: Tensors, static: Static, index: int) -> tuple[Tensor | float | None, ...]:
    first = BATCH_NORMS[index]
    return (*tensors[first : first + 4], static.bn_eps[index])


def _expand(tensors: Tensors, static: Static) -> Hidden:
    x, norm_weight, norm_bias, statistics, fc1_weight, fc1_bias = tensors[:6]
    dw_weight, dw_bias, fc2_weight = tensors[10], tensors[11], tensors[16]
    assert x is not None and fc1_weight is not None and dw_weight is not None and fc2_weight is not None
    (hidden_channels, channels), out_channels = fc1_weight.shape, fc2_weight.shape[0]
    taps = dw_weight.shape[-1] ** 2
    pixels = static.height * static.width
    num_rows = x.shape[0] * pixels
    stride = triton.cdiv(hidden_channels, ALIGNMENT) * ALIGNMENT
    rows = x.new_empty((x.shape[0], pixels, stride), dtype=static.dtype)
    folded = x.new_empty((taps + (3 if static.bn_after_activation else 1), stride), dtype=torch.float32)
    padded = None
    if stride != hidden_channels or fc2_weight.dtype != static.dtype:
        padded = x.new_empty((out_channels, stride), dtype=static.dtype)
    hidden = Hidden(rows, folded, fc2_weight if padded is None else padded)
    if num_rows == 0:
        return hidden
    if static.norm == "group" and statistics is None:
        statistics = group_statistics(x, static.num_prefix_tokens)
    arithmetic = triton_support.arithmetic(static.dtype, x.device)
    config = triton_support.config("expansion", arithmetic, hidden_channels, channels)
    row_tiles = triton.cdiv(num_rows, config.block_m)
    copied_tiles = 0 if padded is None else triton.cdiv(out_channels, config.block_m)
    triton_support.launch(
        expand_kernel,
        (1 + copied_tiles + row_tiles) * triton.cdiv(stride, config.block_n),
        x.device,
        config,
        x,
        (norm_weight, norm_bias, statistics, None if static.norm == "none" else static.norm_eps),
        fc1_weight,
        fc1_bias,
        _batch_norm(tensors, static, 0),
        (dw_weight, dw_bias),
        _batch_norm(tensors, static, 1),
        folded,
        fc2_weight,
        padded,
        rows,
        num_rows,
        channels,
        hidden_channels,
        stride,
        out_channels,
        pixels,
        TAPS=taps,
        ADDS_INPUT=static.inner_residual == "before_activation",
        PREFIX=static.num_prefix_tokens,
        ACTIVATION=static.hidden_activation,
        BN_AFTER_ACTIVATION=static.bn_after_activation,
        EVEN_K=channels % config.block_k == 0,
        ARITHMETIC=arithmetic.constexpr(),
    )
    return hidden


def _project(
    tensors: Tensors, static: Static, hidden: Hidden, residual: Tensor | None, out: Tensor, num_prefix_tokens: int
) -> Tensor | None:
    """Write the branch and its residual into `out`; return the branch's mean over the pixels when that is asked for."""
    dw_weight, fc2_bias = tensors[10], tensors[17]
    assert dw_weight is not None
    out_channels, stride = hidden.weight.shape
    batch, height, width = out.shape[0], static.height, static.width
    arithmetic = triton_support.arithmetic(static.dtype, out.device)
    # Only the result's rows may be unaligned, which the tiles of fp32 bear.
    columns = out_channels if arithmetic.kind == "half" else triton.cdiv(out_channels, ALIGNMENT) * ALIGNMENT
    config = triton_support.config("depthwise_projection", arithmetic, columns)
    # The tiles of a mean are those of one image.
    runs = batch if static.summary == "mean" else 1
    run_rows = batch * height // max(runs, 1)
    strips = max(1, round(width / config.block_m**0.5))
    strip_width = triton.cdiv(width, strips)
    tiles = triton.cdiv(width, strip_width) * triton.cdiv(run_rows * strip_width, config.block_m)
    means = None
    if static.summary == "mean":
        means = out.new_empty((batch, tiles, out_channels), dtype=torch.float32)
    if batch > 0:
        triton_support.launch(
            project_kernel,
            runs * tiles * triton.cdiv(out_channels, config.block_n),
            out.device,
            config,
            hidden.rows,
            hidden.filter,
            hidden.weight,
            fc2_bias,
            _batch_norm(tensors, static, 2),
            residual,
            out,
            means,
            height,
            width,
            run_rows,
            strip_width,
            stride,
            out_channels,
            KERNEL=dw_weight.shape[-1],
            PREFIX=num_prefix_tokens,
            ACTIVATION=static.activation,
            SCALED=static.bn_after_activation and tensors[14] is not None,
            ADDS_INPUT=static.inner_residual == "after_activation",
            EVEN_K=stride % config.block_k == 0,
            ARITHMETIC=arithmetic.constexpr(),
        )
    return None if means is None else means.sum(1)


def _of_cmt(empty: Empty) -> Outputs:
    """Stage 1 of CMT-S: three batch norms, two of them behind the activations, and an inner residual."""
    hidden, bn, out = empty.batch_norm(256), empty.batch_norm(64), empty(8, 784, 64)
    front = [empty(8, 784, 64), empty(64), empty(64), None, empty(256, 64), empty(256)]
    tensors = [
        *front,
        *hidden,
        empty(256, 1, 3, 3),
        empty(256),
        *hidden,
        empty(64, 256),
        empty(64),
        *bn,
        None,
        None,
        out,
    ]
    static = Static(
        *("layer", 1e-6, "gelu", "gelu", "before_activation", True, [1e-5] * 3, False, None),
        *(28, 28, 0, "none", empty.dtype),
    )
    return run(tensors, static)


SPECS = (Spec(expand_kernel, _of_cmt, products=True), Spec(project_kernel, _of_cmt, products=True))
