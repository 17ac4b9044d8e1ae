"""Gradients of head_tokens in Triton: means and head tokens are computed again."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastvit_kernels.ops import library, triton_support
from fastvit_kernels.ops.head_tokens.reference import Static
from fastvit_kernels.ops.head_tokens.triton_kernels import means, place_pieces, whole_rows
from fastvit_kernels.ops.operator import Tensors
from fastvit_kernels.ops.primitives import activation_gradient
from fastvit_kernels.ops.triton_gradients import input_gradient, weight_gradient
from fastvit_kernels.ops.triton_linear import linear
from fastvit_kernels.ops.triton_norm_gradients import layer_norm_gradient
from fastvit_kernels.ops.triton_normalization import row_normalize
from fastvit_kernels.ops.triton_specs import Spec


@triton.jit(do_not_specialize=["num_pieces", "tokens", "out_tokens", "heads"])
def pieces_gradient_kernel(
    grad_ptr,
    projected_ptr,
    norm,
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
    """The gradients of what the activation takes, for the pieces of `pieces_kernel`."""
    pieces = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.arange(0, BLOCK_N)
    mask = (pieces < num_pieces)[:, None] & (columns < width)[None, :]
    offsets = pieces.to(tl.int64)[:, None] * width + columns[None, :]
    y = tl.load(projected_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    y = row_normalize(y, norm, columns, columns < width, width, BLOCK_N)
    sources, _ = place_pieces(pieces, heads, tokens, out_tokens, width)
    grad = tl.load(grad_ptr + sources[:, None] + columns[None, :], mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + offsets, grad * activation_gradient(y, "gelu"), mask=mask)


def run(grads: Sequence[Tensor], tensors: Tensors, needs: Sequence[bool], static: Static) -> list[Tensor]:
    """Backwards from the head tokens to the means, whose gradients join those of the rows."""
    tensors = library.dense(tensors)
    x, norm_weight, norm_bias, weight, bias, head_norm_weight, head_norm_bias, pos_embed = tensors
    assert x is not None and weight is not None and pos_embed is not None
    if grads[0].numel() == 0:
        return [torch.zeros_like(t) for t, needed in zip(tensors, needs, strict=True) if needed and t is not None]
    grad, dtype = grads[0].contiguous(), static.dtype
    batch, tokens, channels = x.shape
    found: list[Tensor | None] = [None] * len(tensors)
    if needs[7]:
        found[7] = grad[:, tokens:].sum(0, dtype=torch.float32).to(pos_embed.dtype)
    behind_rows = any(needs[:3])
    if behind_rows or any(needs[3:7]):
        mean = means(tensors, static, None)
        projected = linear(mean, weight, bias, dtype)
        piece_grad = _through_activation(grad, projected, head_norm_weight, head_norm_bias, tokens, static)
        wanted = (behind_rows or any(needs[3:5]), *needs[5:7])
        pieces = projected.view(piece_grad.shape)
        affine = head_norm_weight, head_norm_bias, static.head_norm_eps
        through, *found[5:7] = layer_norm_gradient(piece_grad, pieces, *affine, wanted)
        if through is not None:
            through = through.view(projected.shape)
            found[3:5] = weight_gradient(through, mean, weight, bias, dtype, needs[3:5])
        if behind_rows:
            assert through is not None
            mean_grad = input_gradient(through, weight, dtype, torch.float32).view(batch, 1, channels)
            rows_grad = grad[:, :tokens] + mean_grad / tokens
            if static.norm_eps is None:
                found[0] = rows_grad.to(x.dtype)
            else:
                norm = norm_weight, norm_bias, static.norm_eps, needs[:3]
                found[:3] = layer_norm_gradient(rows_grad, x, *norm)
    return [g for g, needed in zip(found, needs, strict=True) if needed and g is not None]


def _through_activation(
    grad: Tensor, projected: Tensor, weight: Tensor | None, bias: Tensor | None, tokens: int, static: Static
) -> Tensor:
    """The gradient of what the activation takes, as pieces `[B * h * h, C / h]`."""
    batch, heads, channels = projected.shape
    width = channels // heads
    out = projected.new_empty((batch * heads * heads, width))
    config = whole_rows("norm_gradient", width, grad.device)
    triton_support.launch(
        pieces_gradient_kernel,
        triton.cdiv(len(out), config.block_m),
        grad.device,
        config,
        grad,
        projected,
        (weight, bias, static.head_norm_eps),
        out,
        len(out),
        tokens,
        grad.shape[1],
        heads,
        width,
    )
    return out


SPECS = (
    Spec(
        pieces_gradient_kernel,
        lambda empty: _through_activation(
            empty(8, 205, 384), empty(8, 8, 384), empty(48), empty(48), 197, Static(8, 1e-6, 1e-5, empty.dtype)
        ),
    ),
)
