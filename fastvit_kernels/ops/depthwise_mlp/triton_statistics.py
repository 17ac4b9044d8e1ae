"""Batch statistics of depthwise_mlp in Triton: the maps in front of each batch norm go through memory."""

from __future__ import annotations

import torch
from torch import Tensor

from fastvit_kernels.ops import library
from fastvit_kernels.ops.depthwise_mlp.reference import BATCH_NORMS, Static
from fastvit_kernels.ops.operator import Tensors
from fastvit_kernels.ops.triton_channel_moments import row_moments
from fastvit_kernels.ops.triton_depthwise import Geometry, depthwise, filter_rows
from fastvit_kernels.ops.triton_linear import linear
from fastvit_kernels.ops.triton_moments import group_statistics
from fastvit_kernels.ops.triton_normalization import normalize_rows
from fastvit_kernels.ops.triton_steps import Step, apply


def run(tensors: Tensors, static: Static) -> Tensor:
    """Means and variances `[2, 2 * C_hidden + C_out]` of what the three batch norms take; zeros where there is none.

    As far as there are batch norms: what stands behind the last one has no part in it.
    """
    tensors = library.dense(tensors)
    x, norm_weight, norm_bias, statistics, fc1_weight, fc1_bias = tensors[:6]
    dw_weight, dw_bias, fc2_weight, fc2_bias = (tensors[index] for index in (10, 11, 16, 17))
    assert x is not None and fc1_weight is not None and dw_weight is not None and fc2_weight is not None
    hidden_channels, dtype, kernel = fc1_weight.shape[0], static.dtype, dw_weight.shape[-1]
    last = max((index for index, first in enumerate(BATCH_NORMS) if tensors[first + 2] is not None), default=0)
    out = x.new_zeros((2, 2 * hidden_channels + fc2_weight.shape[0]), dtype=torch.float32)

    def step(index: int, activation: str, before: Tensor, moments: Tensor) -> Step:
        """Batch norm number `index` by the batch's statistics, which are left in `moments`, with the activation."""
        weight, bias, mean, _ = tensors[BATCH_NORMS[index] : BATCH_NORMS[index] + 4]
        if mean is None:
            return Step(activation)
        moments.copy_(row_moments(before, activation if static.bn_after_activation else "none"))
        own = moments.contiguous()
        return Step(activation, (weight, bias, own[0], own[1], static.bn_eps[index]), static.bn_after_activation)

    of_hidden, of_mixed, of_projected = out.split([hidden_channels, hidden_channels, fc2_weight.shape[0]], 1)
    normed = x[:, static.num_prefix_tokens :].contiguous()
    if static.norm != "none":
        rows, normed = normed, torch.empty_like(normed, dtype=dtype)
        if static.norm == "group" and statistics is None:
            statistics = group_statistics(rows)
        normalize_rows(rows, normed, norm_weight, norm_bias, static.norm_eps, statistics=statistics)
    before = linear(normed, fc1_weight, fc1_bias, dtype)
    through = step(0, static.hidden_activation, before, of_hidden)
    if last > 0:
        hidden = apply(before, through)
        sizes = Geometry(static.height, static.width, static.height, static.width, kernel, 1, kernel // 2, 0)
        before = torch.empty_like(hidden)
        depthwise(hidden, filter_rows(dw_weight), dw_bias, sizes, Step("none"), before, None, static.inner_residual)
        through = step(1, static.activation, before, of_mixed)
        if last > 1:
            mixed = apply(before, through, hidden if static.inner_residual == "after_activation" else None)
            step(2, "none", linear(mixed, fc2_weight, fc2_bias, dtype), of_projected)
    return out
