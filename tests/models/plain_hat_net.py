"""HAT-Net in plain PyTorch, for maps of any size: what our modules and models are compared with.

The equations are those of the benchmarks' plain model, which takes whole windows only. Here the windows and the pooled
squares at the right and at the bottom hold what is left of the map, one by one: no padding, no mask. Nothing here uses
what is under test.
"""

from __future__ import annotations

import functools

import torch
from torch import nn

from fastvit_kernels.bench import plain_hat_net as plain
from fastvit_kernels.bench.plain_hat_net import VARIANTS, Mlp, attend, attend_in_windows

__all__ = ["VARIANTS", "Attention", "HATNet", "Mlp", "attend_in_window_slices", "attend_in_windows"]


def attend_in_window_slices(q, k, v, heads, side):
    out = torch.empty_like(v)
    for top in range(0, q.shape[2], side):
        for left in range(0, q.shape[3], side):
            window = (..., slice(top, top + side), slice(left, left + side))
            out[window] = attend(q[window], k[window], v[window], heads)
    return out


class Attention(plain.Attention):
    def __init__(self, dim, head_dim, grid_size=1, ds_ratio=1, drop=0.0):
        super().__init__(dim, head_dim, grid_size, ds_ratio, drop)
        if grid_size > 1:
            self.avg_pool = nn.AvgPool2d(ds_ratio, ds_ratio, ceil_mode=True)

    def attend_in_windows(self, q, k, v):
        whole = q.shape[2] % self.grid_size == 0 and q.shape[3] % self.grid_size == 0
        return (attend_in_windows if whole else attend_in_window_slices)(q, k, v, self.heads, self.grid_size)


HATNet = functools.partial(plain.HATNet, attention=Attention)
