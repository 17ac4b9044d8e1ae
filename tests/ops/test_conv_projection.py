"""conv_projection: the contract, its formula in plain PyTorch, its batch statistics and its messages."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from fastvit_kernels.testing import inputs
from fastvit_kernels.testing.contract import Contract, Rejection


def plain_pytorch(
    x, query, key, value, grid=None, num_prefix_tokens=0, norm_weight=None, norm_bias=None, norm_eps=None
):
    if x.ndim == 4:
        grid = x.shape[2:]
        x = x.flatten(2).mT
    u = x if norm_eps is None else F.layer_norm(x, x.shape[-1:], norm_weight, norm_bias, norm_eps)
    prefix, tokens = u[:, :num_prefix_tokens], u[:, num_prefix_tokens:]
    outputs = []
    for s in (query, key, value):
        maps = tokens.mT.unflatten(2, grid)
        maps = F.conv2d(maps, s.conv_weight, None, s.stride, s.padding, groups=x.shape[-1])
        if s.bn is not None:
            statistics = (s.bn.running_mean, s.bn.running_var)
            if s.bn.training:
                statistics = (None, None)
            if maps.shape[0]:
                maps = F.batch_norm(maps, *statistics, s.bn.weight, s.bn.bias, s.bn.training, 0.0, s.bn.eps)
        outputs.append(F.linear(torch.cat([prefix, maps.flatten(2).mT], 1), s.weight, s.bias))
    return tuple(outputs)


def _sized(name, batch, grid):
    return inputs.conv_projection_case(
        name, batch=batch, grid=grid, channels=8, as_map=torch.channels_last, bn_training=False
    )


class TestConvProjection(Contract, Rejection):
    cases = inputs.CONV_PROJECTION
    fused = ("conv_projection",)
    resizable = frozenset({("x", 0)} | {(f"{name}.weight", 0) for name in ("query", "key", "value")})
    equivalent = staticmethod(plain_pytorch)
    reshaped = (
        [_sized("small", 2, (5, 7)), _sized("other", 3, (6, 4)), _sized("large", 5, (9, 8))],
        {"x": (0, 2, 3)},
    )
