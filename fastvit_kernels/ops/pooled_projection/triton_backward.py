"""Gradients of pooled_projection in Triton: the averages, which are few, are computed again."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastvit_kernels.ops import library, triton_support
from fastvit_kernels.ops.operator import Tensors
from fastvit_kernels.ops.pooled_projection.reference import Static
from fastvit_kernels.ops.pooled_projection.triton_kernels import average
from fastvit_kernels.ops.pooling import pooled_side
from fastvit_kernels.ops.primitives import rows_and_columns
from fastvit_kernels.ops.triton_gradients import input_gradient, weight_gradient
from fastvit_kernels.ops.triton_moments import group_statistics
from fastvit_kernels.ops.triton_norm_gradients import add_statistics_gradient, group_norm_gradient
from fastvit_kernels.ops.triton_normalization import normalize_rows
from fastvit_kernels.ops.triton_specs import Spec


@triton.jit(do_not_specialize=["num_rows", "height", "width", "pooled_height", "pooled_width", "kernel_size"])
def spread_kernel(
    grad_ptr,
    out_ptr,
    num_rows,
    height,
    width,
    pooled_height,
    pooled_width,
    kernel_size,
    channels,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The gradients of BLOCK_M pixels in BLOCK_N channels: equal shares of their squares', zeros outside of squares."""
    rows, columns = rows_and_columns(tl.program_id(0), channels, BLOCK_M, BLOCK_N)
    row_mask = rows < num_rows
    column_mask = columns < channels
    y = rows // width % height // kernel_size
    x = rows % width // kernel_size
    pixels = tl.minimum(height - y * kernel_size, kernel_size) * tl.minimum(width - x * kernel_size, kernel_size)
    square = ((rows // width // height).to(tl.int64) * pooled_height + y) * pooled_width + x
    pooled = row_mask & (y < pooled_height) & (x < pooled_width)
    grad_ptrs = grad_ptr + square[:, None] * channels + columns[None, :]
    grad = tl.load(grad_ptrs, mask=pooled[:, None] & column_mask[None, :], other=0.0)
    offsets = rows.to(tl.int64)[:, None] * channels + columns[None, :]
    tl.store(out_ptr + offsets, grad / pixels.to(tl.float32)[:, None], mask=row_mask[:, None] & column_mask[None, :])


def run(grads: Sequence[Tensor], tensors: Tensors, needs: Sequence[bool], static: Static) -> list[Tensor]:
    """Backwards through the linear and both norms on the pooled rows, then to the pixels."""
    if grads[0].numel() == 0:
        return [torch.zeros_like(t) for t, needed in zip(tensors, needs, strict=True) if needed and t is not None]
    tensors = library.dense(tensors)
    x, in_norm_weight, in_norm_bias, statistics, norm_weight, norm_bias, weight, bias = tensors
    assert x is not None and weight is not None
    grad, dtype = grads[0].contiguous(), static.dtype
    found: list[Tensor | None] = [None] * len(tensors)
    pooled = rows = inner = average(x, None, static)
    own = statistics
    if static.in_norm_eps is not None:
        own = group_statistics(x) if statistics is None else statistics
        rows = inner = torch.empty_like(pooled)
        normalize_rows(pooled, inner, in_norm_weight, in_norm_bias, static.in_norm_eps, statistics=own)
    if static.norm_eps is not None:
        rows = torch.empty_like(pooled, dtype=dtype)
        normalize_rows(inner, rows, norm_weight, norm_bias, static.norm_eps, statistics=group_statistics(inner))
    found[6:8] = weight_gradient(grad, rows, weight, bias, dtype, needs[6:8])
    behind_norm = any(needs[:4])
    if not (behind_norm or any(needs[4:6])):
        return [g for g in found if g is not None]
    grad = input_gradient(grad, weight, dtype, dtype)
    if static.norm_eps is not None:
        wanted = (behind_norm, *needs[4:6], False)
        through, *found[4:6], _ = group_norm_gradient(
            grad, inner, norm_weight, norm_bias, None, static.norm_eps, wanted
        )
        grad = grad if through is None else through
    if behind_norm:
        of_statistics = None
        if static.in_norm_eps is not None:
            wanted = (needs[0], *needs[1:3], needs[3] or (needs[0] and statistics is None))
            through, *found[1:3], of_statistics = group_norm_gradient(
                grad, pooled, in_norm_weight, in_norm_bias, own, static.in_norm_eps, wanted
            )
            grad = grad if through is None else through
        if statistics is not None:
            found[3] = of_statistics
        if needs[0]:
            x_grad = _spread(grad, x, static)
            if statistics is None and of_statistics is not None:
                x_grad = add_statistics_gradient(x_grad, x, of_statistics)
            found[0] = x_grad
    return [g for g, needed in zip(found, needs, strict=True) if needed and g is not None]


def _spread(grad: Tensor, x: Tensor, static: Static) -> Tensor:
    """From the gradients of the averages to those of x."""
    out = torch.empty_like(x)
    channels = x.shape[-1]
    num_rows = out.numel() // channels
    config = triton_support.config("elementwise", triton_support.arithmetic(torch.float32, x.device), channels)
    triton_support.launch(
        spread_kernel,
        config.tiles(num_rows, channels),
        x.device,
        config,
        grad,
        out,
        num_rows,
        static.height,
        static.width,
        *(pooled_side(s, static.kernel_size, static.ceil_mode) for s in (static.height, static.width)),
        static.kernel_size,
        channels,
    )
    return out


SPECS = (
    Spec(
        spread_kernel,
        lambda empty: _spread(empty(8, 49, 128), empty(8, 784, 128), Static(1e-6, 1e-6, 28, 28, 4, False, empty.dtype)),
    ),
)
