"""Gradients of pointwise_mlp in Triton: the hidden rows are computed again and go through memory once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastvit_kernels.ops import library, triton_support
from fastvit_kernels.ops.operator import Tensors
from fastvit_kernels.ops.pointwise_mlp.reference import Static
from fastvit_kernels.ops.primitives import activate, activation_gradient, dot, rows_and_columns, vector
from fastvit_kernels.ops.triton_gradients import input_gradient, input_gradient_tile, weight_gradient
from fastvit_kernels.ops.triton_norm_gradients import layer_norm_gradient
from fastvit_kernels.ops.triton_normalization import normalize_rows
from fastvit_kernels.ops.triton_specs import Empty, Spec


@triton.jit(do_not_specialize=["num_rows"])
def hidden_gradient_kernel(
    x_ptr,
    weight1_ptr,
    bias1_ptr,
    grad_ptr,
    weight2_ptr,
    hidden_ptr,
    out_ptr,
    num_rows,
    channels,
    hidden_channels,
    out_channels,
    ACTIVATION: tl.constexpr,
    EVEN_K: tl.constexpr,
    EVEN_OUT: tl.constexpr,
    ARITHMETIC: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """BLOCK_M rows and BLOCK_N hidden channels: what the activation gives, and the gradient of what it takes."""
    rows, columns = rows_and_columns(tl.program_id(0), hidden_channels, BLOCK_M, BLOCK_N)
    row_mask = rows < num_rows
    column_mask = columns < hidden_channels
    x_rows = x_ptr + rows.to(tl.int64)[:, None] * channels
    weight_columns = weight1_ptr + columns.to(tl.int64)[None, :] * channels
    before = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, channels, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        k_mask = k < channels
        if EVEN_K:
            x = tl.load(x_rows + k[None, :], mask=row_mask[:, None], other=0.0)
            weight = tl.load(weight_columns + k[:, None], mask=column_mask[None, :], other=0.0)
        else:
            x = tl.load(x_rows + k[None, :], mask=row_mask[:, None] & k_mask[None, :], other=0.0)
            weight = tl.load(weight_columns + k[:, None], mask=k_mask[:, None] & column_mask[None, :], other=0.0)
        before = dot(x, weight, before, ARITHMETIC)
    before += vector(bias1_ptr, columns, column_mask, 0.0, BLOCK_N)[None, :]
    offsets = rows.to(tl.int64)[:, None] * hidden_channels + columns[None, :]
    mask = row_mask[:, None] & column_mask[None, :]
    if hidden_ptr is not None:
        tl.store(hidden_ptr + offsets, activate(before, ACTIVATION), mask=mask)
    if out_ptr is not None:
        grad = input_gradient_tile(
            *(grad_ptr, weight2_ptr, rows, row_mask, columns, out_channels, hidden_channels),
            *(EVEN_OUT, ARITHMETIC, BLOCK_M, BLOCK_N, BLOCK_K),
        )
        tl.store(out_ptr + offsets, grad * activation_gradient(before, ACTIVATION), mask=mask)


def run(grads: Sequence[Tensor], tensors: Tensors, needs: Sequence[bool], static: Static) -> list[Tensor]:
    """One launch for the hidden rows and their gradients, then the linears' own, then the norm's."""
    tensors = library.dense(tensors)
    x, norm_weight, norm_bias, weight1, bias1, weight2, bias2, residual = tensors
    assert x is not None and weight1 is not None and weight2 is not None
    grad, dtype = grads[0].contiguous(), static.dtype
    found: list[Tensor | None] = [None] * len(tensors)
    if needs[7] and residual is not None:
        found[7] = grad.to(residual.dtype, copy=True)
    normed = x
    if static.norm_eps is not None:
        normed = torch.empty_like(x, dtype=dtype)
        normalize_rows(x, normed, norm_weight, norm_bias, static.norm_eps)
    hidden, hidden_grad = _hidden(normed, grad, tensors, needs, static)
    found[5:7] = weight_gradient(grad, hidden, weight2, bias2, dtype, needs[5:7])
    found[3:5] = weight_gradient(hidden_grad, normed, weight1, bias1, dtype, needs[3:5])
    if any(needs[:3]):
        if static.norm_eps is None:
            found[0] = input_gradient(hidden_grad, weight1, dtype, x.dtype)
        else:
            normed_grad = input_gradient(hidden_grad, weight1, dtype, dtype)
            found[:3] = layer_norm_gradient(normed_grad, x, norm_weight, norm_bias, static.norm_eps, needs[:3])
    return [g for g in found if g is not None]


def _hidden(
    normed: Tensor, grad: Tensor, tensors: Tensors, needs: Sequence[bool], static: Static
) -> tuple[Tensor, Tensor]:
    """What the activation gives and the gradient of what it takes, empty where nobody needs it."""
    weight1, bias1, weight2 = tensors[3:6]
    assert weight1 is not None and weight2 is not None
    (hidden_channels, channels), out_channels = weight1.shape, weight2.shape[0]
    num_rows = normed.numel() // channels
    wanted = needs[5], any(needs[:5])
    shape = (*normed.shape[:-1], hidden_channels)
    hidden, hidden_grad = (normed.new_empty(shape if needed else 0, dtype=static.dtype) for needed in wanted)
    if num_rows > 0 and any(wanted):
        arithmetic = triton_support.arithmetic(static.dtype, normed.device)
        config = triton_support.config("hidden_gradient", arithmetic, hidden_channels, channels, out_channels)
        triton_support.launch(
            hidden_gradient_kernel,
            config.tiles(num_rows, hidden_channels),
            normed.device,
            config,
            normed,
            weight1,
            bias1,
            grad,
            weight2,
            hidden if wanted[0] else None,
            hidden_grad if wanted[1] else None,
            num_rows,
            channels,
            hidden_channels,
            out_channels,
            ACTIVATION=static.activation,
            EVEN_K=channels % config.block_k == 0,
            EVEN_OUT=out_channels % config.block_k == 0,
            ARITHMETIC=arithmetic.constexpr(),
        )
    return hidden, hidden_grad


def _of_cvt(empty: Empty) -> list[Tensor]:
    """Stage 1 of CvT-13."""
    rows = empty(8, 784, 64)
    tensors = [rows, empty(64), empty(64), empty(256, 64), empty(256), empty(64, 256), empty(64), rows]
    return run([rows], tensors, [True] * 8, Static(1e-5, "quick_gelu", empty.dtype))


SPECS = (Spec(hidden_gradient_kernel, _of_cvt, products=True),)
