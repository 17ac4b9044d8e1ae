"""Triton kernels of conv_projection: a small preparation, then one launch that makes q, k and v."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastvit_kernels.ops import library, triton_support
from fastvit_kernels.ops.conv_projection.reference import BRANCHES, Static, branch, output_grid
from fastvit_kernels.ops.operator import Outputs, Tensors
from fastvit_kernels.ops.primitives import dot, fold_filter, vector
from fastvit_kernels.ops.triton_depthwise import Geometry, depthwise_moments, filter_rows
from fastvit_kernels.ops.triton_normalization import normalize_rows, normalize_tile
from fastvit_kernels.ops.triton_specs import Empty, Spec


@triton.jit
def fold_branch(block, filter, channels, TAPS: tl.constexpr, BLOCK: tl.constexpr):
    """`fold_filter` of BLOCK channels of one branch."""
    weight_ptr, bn_weight_ptr, bn_bias_ptr, bn_mean_ptr, bn_var_ptr, bn_eps, folded_ptr = filter
    bn = (bn_weight_ptr, bn_bias_ptr, bn_mean_ptr, bn_var_ptr, bn_eps)
    fold_filter(block, (weight_ptr, None), bn, folded_ptr, channels, channels, TAPS, 0.0, BLOCK)


@triton.jit(do_not_specialize=["num_rows"])
def prepare_kernel(
    x_ptr,
    norm_weight_ptr,
    norm_bias_ptr,
    normed_ptr,
    query,
    key,
    value,
    num_rows,
    channels,
    norm_eps,
    TAPS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The first programs fold the three filters, BLOCK_N channels each; the others normalise BLOCK_M tokens each."""
    QUERY_TAPS: tl.constexpr = TAPS[0]
    KEY_TAPS: tl.constexpr = TAPS[1]
    VALUE_TAPS: tl.constexpr = TAPS[2]
    program = tl.program_id(0)
    blocks = tl.cdiv(channels, BLOCK_N)
    if program < blocks:
        fold_branch(program, query, channels, QUERY_TAPS, BLOCK_N)
    elif program < 2 * blocks:
        fold_branch(program - blocks, key, channels, KEY_TAPS, BLOCK_N)
    elif program < 3 * blocks:
        fold_branch(program - 2 * blocks, value, channels, VALUE_TAPS, BLOCK_N)
    elif norm_eps is not None:
        norm = (norm_weight_ptr, norm_bias_ptr, None, norm_eps)
        normalize_tile(
            *(program - 3 * blocks, x_ptr, norm, None, normed_ptr, num_rows, channels, num_rows),
            *(0, BLOCK_M, BLOCK_K),
        )


@triton.jit
def project_tile(
    tile,
    x_ptr,
    branch,
    batch,
    channels,
    height,
    width,
    WINDOW: tl.constexpr,
    PREFIX: tl.constexpr,
    EVEN_K: tl.constexpr,
    ARITHMETIC: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """BLOCK_M output tokens and BLOCK_N output channels of one branch; `WINDOW` is (kernel, stride, padding).

    The rows of the product are made on the way into it, a block of channels at a time: the taps of the depthwise filter
    are gathered from x, with zeros outside the map, and summed in fp32.
    """
    folded_ptr, weight_ptr, bias_ptr, out_ptr, out_channels = branch
    KERNEL: tl.constexpr = WINDOW[0]
    STRIDE: tl.constexpr = WINDOW[1]
    PADDING: tl.constexpr = WINDOW[2]
    out_height = (height + 2 * PADDING - KERNEL) // STRIDE + 1
    out_width = (width + 2 * PADDING - KERNEL) // STRIDE + 1
    # `rows_and_columns` spelled out: with it the assembler for sm_80 spills registers.
    column_tiles = tl.cdiv(out_channels, BLOCK_N)
    rows = tile // column_tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tile % column_tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    out_tokens = PREFIX + out_height * out_width
    row_mask = rows < batch * out_tokens
    column_mask = columns < out_channels
    # Prefix tokens have negative numbers: they are off the map, in front of its first token.
    token = rows % out_tokens - PREFIX
    first = (rows // out_tokens).to(tl.int64) * (PREFIX + height * width) + PREFIX
    on_map = row_mask & (token >= 0)
    top = token // out_width * STRIDE - PADDING
    left = token % out_width * STRIDE - PADDING
    weight_columns = weight_ptr + columns.to(tl.int64)[None, :] * channels
    accumulator = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, channels, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        k_mask = k < channels
        # Asked for before the taps, to arrive while they are summed.
        if EVEN_K:
            weight = tl.load(weight_columns + k[:, None], mask=column_mask[None, :], other=0.0)
        else:
            weight = tl.load(weight_columns + k[:, None], mask=k_mask[:, None] & column_mask[None, :], other=0.0)
        values = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
        for tap_y in range(KERNEL):
            y = top + tap_y
            on_row = on_map & (y >= 0) & (y < height)
            row = first + y * width
            # One row of taps is in flight at a time; all of a 3 x 3 filter at once would spill registers.
            for tap_x in tl.static_range(KERNEL):
                x = left + tap_x
                mask = (on_row & (x >= 0) & (x < width))[:, None] & k_mask[None, :]
                source = (row + x)[:, None] * channels + k[None, :]
                tokens = tl.load(x_ptr + source, mask=mask, other=0.0).to(tl.float32)
                tap = tl.load(folded_ptr + (tap_y * KERNEL + tap_x) * channels + k, mask=k_mask, other=0.0)
                values += tokens * tap[None, :]
        values += tl.load(folded_ptr + KERNEL * KERNEL * channels + k, mask=k_mask, other=0.0)[None, :]
        if PREFIX > 0:
            is_prefix = (row_mask & (token < 0))[:, None]
            source = (first + token)[:, None] * channels + k[None, :]
            prefix = tl.load(x_ptr + source, mask=is_prefix & k_mask[None, :], other=0.0)
            values = tl.where(is_prefix, prefix.to(tl.float32), values)
        accumulator = dot(values, weight, accumulator, ARITHMETIC)
    accumulator += vector(bias_ptr, columns, column_mask, 0.0, BLOCK_N)[None, :]
    offsets = rows.to(tl.int64)[:, None] * out_channels + columns[None, :]
    tl.store(out_ptr + offsets, accumulator, mask=row_mask[:, None] & column_mask[None, :])


@triton.jit(do_not_specialize=["query_tiles", "key_tiles", "batch", "height", "width"])
def project_kernel(
    x_ptr,
    query,
    key,
    value,
    query_tiles,
    key_tiles,
    batch,
    channels,
    height,
    width,
    WINDOWS: tl.constexpr,
    PREFIX: tl.constexpr,
    EVEN_K: tl.constexpr,
    ARITHMETIC: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Tiles of q, then of k, then of v: the maps of k and v are often too small to fill a GPU alone."""
    QUERY_WINDOW: tl.constexpr = WINDOWS[0]
    KEY_WINDOW: tl.constexpr = WINDOWS[1]
    VALUE_WINDOW: tl.constexpr = WINDOWS[2]
    tile = tl.program_id(0)
    if tile < query_tiles:
        project_tile(
            *(tile, x_ptr, query, batch, channels, height, width),
            *(QUERY_WINDOW, PREFIX, EVEN_K, ARITHMETIC, BLOCK_M, BLOCK_N, BLOCK_K),
        )
    elif tile < query_tiles + key_tiles:
        tile -= query_tiles
        project_tile(
            *(tile, x_ptr, key, batch, channels, height, width),
            *(KEY_WINDOW, PREFIX, EVEN_K, ARITHMETIC, BLOCK_M, BLOCK_N, BLOCK_K),
        )
    else:
        tile -= query_tiles + key_tiles
        project_tile(
            *(tile, x_ptr, value, batch, channels, height, width),
            *(VALUE_WINDOW, PREFIX, EVEN_K, ARITHMETIC, BLOCK_M, BLOCK_N, BLOCK_K),
        )


def run(tensors: Tensors, static: Static) -> Outputs:
    """Two launches: normalised tokens and folded filters, then all three branches.

    The tokens are normalised once, into memory, because the projection gathers each of them up to nine times for every
    branch and every tile of columns, and normalising takes more arithmetic than the tap that it is for. What the
    convolutions give never touches memory.
    """
    tensors = library.dense(tensors)
    x, norm_weight, norm_bias = tensors[:3]
    assert x is not None
    batch, tokens, channels = x.shape
    branches = [branch(tensors, index) for index in range(len(BRANCHES))]
    widths = [b.weight.shape[0] for b in branches]
    kernels = [b.conv_weight.shape[-1] for b in branches]
    grids = [output_grid(static, index, kernel) for index, kernel in enumerate(kernels)]
    lengths = [static.num_prefix_tokens + height * width for height, width in grids]
    outputs = tuple(x.new_empty((batch, n, out), dtype=static.dtype) for n, out in zip(lengths, widths, strict=True))
    if batch == 0:
        return outputs
    folded = [x.new_empty((kernel**2 + 1, channels), dtype=torch.float32) for kernel in kernels]
    normed = x if static.norm_eps is None else x.new_empty(x.shape, dtype=static.dtype)

    arithmetic = triton_support.arithmetic(static.dtype, x.device)
    config = triton_support.config("prepare", arithmetic, channels)
    triton_support.launch(
        prepare_kernel,
        3 * triton.cdiv(channels, config.block_n)
        + (0 if static.norm_eps is None else triton.cdiv(batch * tokens, config.block_m)),
        x.device,
        config,
        x,
        norm_weight,
        norm_bias,
        normed,
        *((*b[:5], eps, f) for b, eps, f in zip(branches, static.bn_eps, folded, strict=True)),
        batch * tokens,
        channels,
        static.norm_eps,
        TAPS=tuple(kernel**2 for kernel in kernels),
    )
    config = triton_support.config("projection", arithmetic, max(widths), channels, *widths)
    tiles = [config.tiles(batch * n, out) for n, out in zip(lengths, widths, strict=True)]
    triton_support.launch(
        project_kernel,
        sum(tiles),
        x.device,
        config,
        normed,
        *(
            (f, b.weight, b.bias, out, width)
            for f, b, out, width in zip(folded, branches, outputs, widths, strict=True)
        ),
        tiles[0],
        tiles[1],
        batch,
        channels,
        static.height,
        static.width,
        WINDOWS=tuple(zip(kernels, static.stride, static.padding, strict=True)),
        PREFIX=static.num_prefix_tokens,
        EVEN_K=channels % config.block_k == 0,
        ARITHMETIC=arithmetic.constexpr(),
    )
    return outputs


def geometry(tensors: Tensors, static: Static, index: int) -> Geometry:
    """The sizes of a branch's convolution."""
    kernel = branch(tensors, index).conv_weight.shape[-1]
    window = kernel, static.stride[index], static.padding[index]
    grid = output_grid(static, index, kernel)
    return Geometry(static.height, static.width, *grid, *window, static.num_prefix_tokens)


def statistics(tensors: Tensors, static: Static) -> Tensor:
    """`reference.batch_statistics`; normalised tokens and filtered maps go through memory."""
    tensors = library.dense(tensors)
    x, norm_weight, norm_bias = tensors[:3]
    assert x is not None
    normed = x
    if static.norm_eps is not None:
        normed = torch.empty_like(x, dtype=static.dtype)
        normalize_rows(x, normed, norm_weight, norm_bias, static.norm_eps)
    found = []
    for index in range(len(BRANCHES)):
        filter = filter_rows(branch(tensors, index).conv_weight)
        found.append(depthwise_moments(normed, filter, None, geometry(tensors, static, index), static.dtype))
    return torch.stack(found)


def _of_cvt(empty: Empty) -> Outputs:
    """Stage 2 of CvT-13."""
    norms = [empty(192, 1, 3, 3), *empty.batch_norm(192)]
    tensors = [empty(8, 784, 192), empty(192), empty(192), *(3 * [*norms, empty(192, 192), empty(192)])]
    return run(tensors, Static(1e-5, [1e-5] * 3, False, 28, 28, 0, [1, 2, 2], [1, 1, 1], empty.dtype))


SPECS = (Spec(prepare_kernel, _of_cvt), Spec(project_kernel, _of_cvt, products=True))
