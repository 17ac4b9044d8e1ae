"""The depthwise convolution of a map of tokens and its gradients in Triton, through memory.

A window is (kernel size, stride, padding). Samples of the convolution's input and of its result may have prefix rows in
front of their pixels, which these kernels pass over. Filters come as `filter_rows` makes them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastvit_kernels.ops import triton_support
from fastvit_kernels.ops.primitives import rows_and_columns, vector
from fastvit_kernels.ops.triton_channel_moments import row_moments
from fastvit_kernels.ops.triton_specs import Empty, Spec
from fastvit_kernels.ops.triton_steps import Step, apply_step, step_gradient
from fastvit_kernels.ops.triton_sums import split_rows, sum_parts

# Columns of the filter that a program sums the gradients of.
_TAPS_AT_ONCE = 3


class Geometry(NamedTuple):
    """Sizes of a depthwise convolution of `[B, prefix + height * width, C]`."""

    height: int
    width: int
    out_height: int
    out_width: int
    kernel: int
    stride: int
    padding: int
    prefix: int

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        return self[:4]

    @property
    def window(self) -> tuple[int, int, int]:
        return self.kernel, self.stride, self.padding


@triton.jit
def place(rows, height, width):
    """Sample, line and column of these pixels."""
    line = rows // width
    return (line // height).to(tl.int64), line % height, rows % width


@triton.jit(do_not_specialize=["num_rows", "height", "width", "out_height", "out_width"])
def depthwise_kernel(
    x_ptr,
    filter_ptr,
    bias_ptr,
    bn,
    before_ptr,
    out_ptr,
    num_rows,
    height,
    width,
    out_height,
    out_width,
    channels,
    WINDOW: tl.constexpr,
    PREFIX: tl.constexpr,
    ADDS_BEFORE: tl.constexpr,
    ADDS_BEHIND: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BN_AFTER_ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """BLOCK_M pixels and BLOCK_N channels of the convolution, and of what batch norm and activation make of it.

    The input is added to the convolution's result with `ADDS_BEFORE`, to that of the activation with `ADDS_BEHIND`.
    """
    KERNEL: tl.constexpr = WINDOW[0]
    STRIDE: tl.constexpr = WINDOW[1]
    PADDING: tl.constexpr = WINDOW[2]
    AT_ONCE: tl.constexpr = KERNEL if KERNEL <= 3 else 1
    rows, columns = rows_and_columns(tl.program_id(0), channels, BLOCK_M, BLOCK_N)
    column_mask = columns < channels
    inside = rows < num_rows
    sample, y, x = place(rows, out_height, out_width)
    first = sample * (PREFIX + height * width) + PREFIX
    top = y * STRIDE - PADDING
    left = x * STRIDE - PADDING
    values = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, KERNEL * KERNEL, AT_ONCE):
        for other in tl.static_range(AT_ONCE):
            tap = start + other
            from_y = top + tap // KERNEL
            from_x = left + tap % KERNEL
            there = inside & (from_y >= 0) & (from_y < height) & (from_x >= 0) & (from_x < width)
            source = (first + from_y * width + from_x)[:, None] * channels + columns[None, :]
            pixels = tl.load(x_ptr + source, mask=there[:, None] & column_mask[None, :], other=0.0)
            weight = tl.load(filter_ptr + tap * channels + columns, mask=column_mask, other=0.0)
            values += pixels.to(tl.float32) * weight[None, :]
    values += vector(bias_ptr, columns, column_mask, 0.0, BLOCK_N)[None, :]
    mask = inside[:, None] & column_mask[None, :]
    here = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if ADDS_BEFORE or ADDS_BEHIND:
        source = (first + y * width + x)[:, None] * channels + columns[None, :]
        here = tl.load(x_ptr + source, mask=mask, other=0.0).to(tl.float32)
    if ADDS_BEFORE:
        values += here
    if before_ptr is not None:
        tl.store(before_ptr + rows.to(tl.int64)[:, None] * channels + columns[None, :], values, mask=mask)
    if out_ptr is not None:
        values = apply_step(values, bn, columns, column_mask, ACTIVATION, BN_AFTER_ACTIVATION, BLOCK_N)
        if ADDS_BEHIND:
            values += here
        target = rows + (sample + 1) * PREFIX
        tl.store(out_ptr + target[:, None] * channels + columns[None, :], values, mask=mask)


@triton.jit(do_not_specialize=["num_rows", "height", "width", "out_height", "out_width"])
def depthwise_input_gradient_kernel(
    grad_ptr,
    filter_ptr,
    added_ptr,
    x_ptr,
    bn,
    means_ptr,
    out_ptr,
    num_rows,
    height,
    width,
    out_height,
    out_width,
    channels,
    WINDOW: tl.constexpr,
    PREFIX: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BN_AFTER_ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The gradients of BLOCK_M pixels and BLOCK_N channels of the convolution's input.

    `added_ptr` holds what else they get. With `x_ptr` the input is what batch norm and activation make of x, and the
    gradient goes on through them.
    """
    KERNEL: tl.constexpr = WINDOW[0]
    STRIDE: tl.constexpr = WINDOW[1]
    PADDING: tl.constexpr = WINDOW[2]
    AT_ONCE: tl.constexpr = KERNEL if KERNEL <= 3 else 1
    rows, columns = rows_and_columns(tl.program_id(0), channels, BLOCK_M, BLOCK_N)
    column_mask = columns < channels
    inside = rows < num_rows
    sample, y, x = place(rows, height, width)
    first = sample * out_height * out_width
    values = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, KERNEL * KERNEL, AT_ONCE):
        for other in tl.static_range(AT_ONCE):
            tap = start + other
            # The results whose window has this pixel under this tap.
            down = y + PADDING - tap // KERNEL
            along = x + PADDING - tap % KERNEL
            there = inside & (down >= 0) & (along >= 0)
            to_y = down // STRIDE
            to_x = along // STRIDE
            there = there & (to_y < out_height) & (to_x < out_width)
            if STRIDE > 1:
                there = there & (down % STRIDE == 0) & (along % STRIDE == 0)
            source = (first + to_y * out_width + to_x)[:, None] * channels + columns[None, :]
            grad = tl.load(grad_ptr + source, mask=there[:, None] & column_mask[None, :], other=0.0)
            weight = tl.load(filter_ptr + tap * channels + columns, mask=column_mask, other=0.0)
            values += grad.to(tl.float32) * weight[None, :]
    offsets = (rows + (sample + 1) * PREFIX)[:, None] * channels + columns[None, :]
    mask = inside[:, None] & column_mask[None, :]
    if added_ptr is not None:
        values += tl.load(added_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    if x_ptr is not None:
        before = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        values = step_gradient(
            *(values, before, bn, means_ptr, channels, columns, column_mask),
            *(ACTIVATION, BN_AFTER_ACTIVATION, BLOCK_N),
        )
    tl.store(out_ptr + offsets, values, mask=mask)


@triton.jit
def tap_gradient(
    x_ptr, grad, first, y, x, inside, columns, column_mask, height, width, channels, WINDOW: tl.constexpr, tap_y, tap_x
):
    """The summands of one tap's gradient; zeros for a tap that the filter does not have."""
    KERNEL: tl.constexpr = WINDOW[0]
    STRIDE: tl.constexpr = WINDOW[1]
    PADDING: tl.constexpr = WINDOW[2]
    from_y = y * STRIDE - PADDING + tap_y
    from_x = x * STRIDE - PADDING + tap_x
    end = tl.where(tap_x < KERNEL, width, 0)
    there = inside & (from_y >= 0) & (from_y < height) & (from_x >= 0) & (from_x < end)
    source = (first + from_y * width + from_x)[:, None] * channels + columns[None, :]
    pixels = tl.load(x_ptr + source, mask=there[:, None] & column_mask[None, :], other=0.0)
    return grad * pixels.to(tl.float32)


@triton.jit(do_not_specialize=["num_rows", "part_rows", "height", "width", "out_height", "out_width"])
def depthwise_filter_gradient_kernel(
    x_ptr,
    grad_ptr,
    parts_ptr,
    num_rows,
    part_rows,
    height,
    width,
    out_height,
    out_width,
    channels,
    WINDOW: tl.constexpr,
    PREFIX: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """What `part_rows` pixels add to the gradients of three taps, side by side, for BLOCK_N channels.

    A part holds a row for every tap and, behind them, one for the bias.
    """
    KERNEL: tl.constexpr = WINDOW[0]
    TRIPLES: tl.constexpr = (KERNEL + 2) // 3
    triple = tl.program_id(0) % (KERNEL * TRIPLES)
    tiles = tl.cdiv(channels, BLOCK_N)
    block = tl.program_id(0) // (KERNEL * TRIPLES)
    columns = block % tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    column_mask = columns < channels
    part = block // tiles
    tap_y = triple // TRIPLES
    tap_x = triple % TRIPLES * 3
    first_row = part * part_rows
    end = tl.minimum(first_row + part_rows, num_rows)
    left = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    middle = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    right = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(first_row, end, BLOCK_M):
        rows = start + tl.arange(0, BLOCK_M)
        inside = rows < end
        sample, y, x = place(rows, out_height, out_width)
        first = sample * (PREFIX + height * width) + PREFIX
        grad_ptrs = grad_ptr + rows.to(tl.int64)[:, None] * channels + columns[None, :]
        grad = tl.load(grad_ptrs, mask=inside[:, None] & column_mask[None, :], other=0.0).to(tl.float32)
        total += grad
        left += tap_gradient(
            x_ptr, grad, first, y, x, inside, columns, column_mask, height, width, channels, WINDOW, tap_y, tap_x
        )
        middle += tap_gradient(
            x_ptr, grad, first, y, x, inside, columns, column_mask, height, width, channels, WINDOW, tap_y, tap_x + 1
        )
        right += tap_gradient(
            x_ptr, grad, first, y, x, inside, columns, column_mask, height, width, channels, WINDOW, tap_y, tap_x + 2
        )
    parts_ptr += part.to(tl.int64) * (KERNEL * KERNEL + 1) * channels + columns
    tap = tap_y * KERNEL + tap_x
    tl.store(parts_ptr + tap * channels, tl.sum(left, 0), mask=column_mask)
    if tap_x + 1 < KERNEL:
        tl.store(parts_ptr + (tap + 1) * channels, tl.sum(middle, 0), mask=column_mask)
    if tap_x + 2 < KERNEL:
        tl.store(parts_ptr + (tap + 2) * channels, tl.sum(right, 0), mask=column_mask)
    if triple == 0:
        tl.store(parts_ptr + KERNEL * KERNEL * channels, tl.sum(total, 0), mask=column_mask)


def filter_rows(weight: Tensor) -> Tensor:
    """A filter `[C, 1, K, K]` as fp32 `[K * K, C]`: a tap is read without gaps."""
    return weight.flatten(1).t().float().contiguous()


def depthwise(
    x: Tensor,
    filter: Tensor,
    bias: Tensor | None,
    geometry: Geometry,
    step: Step,
    before: Tensor | None,
    out: Tensor | None,
    inner_residual: str = "none",
) -> None:
    """Write the convolution into `before` (without prefix rows) and what `step` makes of it into `out`, if given."""
    channels = x.shape[-1]
    num_rows = x.shape[0] * geometry.out_height * geometry.out_width
    if num_rows == 0:
        return
    place = "depthwise", triton_support.arithmetic(torch.float32, x.device), channels
    config = triton_support.config(*place)
    triton_support.launch(
        depthwise_kernel,
        config.tiles(num_rows, channels),
        x.device,
        config,
        x,
        filter,
        bias,
        step.bn,
        before,
        out,
        num_rows,
        *geometry.sizes,
        channels,
        WINDOW=geometry.window,
        PREFIX=geometry.prefix,
        ADDS_BEFORE=inner_residual == "before_activation",
        ADDS_BEHIND=inner_residual == "after_activation",
        ACTIVATION=step.activation,
        BN_AFTER_ACTIVATION=step.bn_after_activation,
        **triton_support.all_registers(config, *place),
    )


def depthwise_moments(x: Tensor, filter: Tensor, bias: Tensor | None, geometry: Geometry, dtype: torch.dtype) -> Tensor:
    """Mean and biased variance `[2, C]` in fp32 of the convolution's result, which goes through memory in `dtype`."""
    shape = (x.shape[0], geometry.out_height * geometry.out_width, x.shape[2])
    convolved = x.new_empty(shape, dtype=dtype)
    depthwise(x, filter, bias, geometry, Step("none"), convolved, None)
    return row_moments(convolved, "none")


def depthwise_input_gradient(
    grad: Tensor,
    filter: Tensor,
    geometry: Geometry,
    out: Tensor,
    *,
    added: Tensor | None = None,
    x: Tensor | None = None,
    step: Step | None = None,
) -> None:
    """Write the gradient of the convolution's input, plus `added`, into the pixels' rows of `out`.

    With `step`, which made the input from x without statistics of its own, the gradient of x.
    """
    channels = out.shape[-1]
    num_rows = out.shape[0] * geometry.height * geometry.width
    if num_rows == 0:
        return
    through = step or Step("none")
    assert not through.training
    config = triton_support.config("elementwise", triton_support.arithmetic(torch.float32, out.device), channels)
    triton_support.launch(
        depthwise_input_gradient_kernel,
        config.tiles(num_rows, channels),
        out.device,
        config,
        grad,
        filter,
        added,
        x,
        through.bn,
        None,
        out,
        num_rows,
        *geometry.sizes,
        channels,
        WINDOW=geometry.window,
        PREFIX=geometry.prefix,
        ACTIVATION=through.activation,
        BN_AFTER_ACTIVATION=through.bn_after_activation,
    )


def depthwise_filter_gradient(
    x: Tensor, grad: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry
) -> tuple[Tensor, Tensor | None]:
    """The gradients of the filter and, where there is one, of the bias, from the dense gradient of the result."""
    channels, taps = x.shape[-1], geometry.kernel**2
    num_rows = grad.numel() // channels
    config = triton_support.config("filter_gradient", triton_support.arithmetic(torch.float32, x.device), channels)
    tiles = triton.cdiv(channels, config.block_n)
    programs = tiles * geometry.kernel * triton.cdiv(geometry.kernel, _TAPS_AT_ONCE)
    num_parts, part_rows = split_rows(num_rows, config.block_m, programs)
    parts = x.new_empty((num_parts, (taps + 1) * channels), dtype=torch.float32)
    if num_parts > 0:
        triton_support.launch(
            depthwise_filter_gradient_kernel,
            num_parts * programs,
            x.device,
            config,
            x,
            grad,
            parts,
            num_rows,
            part_rows,
            *geometry.sizes,
            channels,
            WINDOW=geometry.window,
            PREFIX=geometry.prefix,
        )
    like = parts.new_empty(channels)
    taps_first, bias_sums = sum_parts(parts, parts.new_empty(taps, channels), like if bias is None else bias)
    filter = taps_first.t().contiguous().to(weight.dtype).view(weight.shape)
    return filter, None if bias is None else bias_sums


_MAP = Geometry(28, 28, 28, 28, 3, 1, 1, 0)


def _forward(empty: Empty) -> None:
    step = Step("gelu", (*empty.batch_norm(256), 1e-5))
    rows = empty(8, 784, 256), empty.wide(9, 256), empty(256)
    depthwise(*rows, _MAP, step, empty(8, 784, 256), empty(8, 784, 256), "before_activation")


def _backward(empty: Empty) -> None:
    grad, before, out = empty(8, 784, 256), empty(8, 784, 256), empty(8, 784, 256)
    step = Step("gelu", (*empty.batch_norm(256), 1e-5))
    depthwise_input_gradient(grad, empty.wide(9, 256), _MAP, out, added=grad, x=before, step=step)


SPECS = (
    Spec(depthwise_kernel, _forward),
    Spec(depthwise_input_gradient_kernel, _backward),
    Spec(
        depthwise_filter_gradient_kernel,
        lambda empty: depthwise_filter_gradient(
            *(empty(8, 784, 256), empty(8, 784, 256), empty(256, 1, 3, 3), empty(256)), _MAP
        ),
    ),
)
