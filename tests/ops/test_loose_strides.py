"""Tensors that PyTorch calls contiguous whatever the stride of a dimension of size 1."""

from __future__ import annotations

import pytest
import torch

from fastvit_kernels.ops import global_attention, local_attention
from fastvit_kernels.testing import relative_l2

BATCH, CHANNELS = 3, 16
# Of a 1 x 1 map in channels-first, and of sequence-first rows.
STRIDES = {"map": (CHANNELS, 1, 1), "sequence first": (CHANNELS, BATCH * CHANNELS, 1)}


def rows(count, strides, seed):
    x = torch.randn(BATCH, count, CHANNELS, generator=torch.Generator().manual_seed(seed))
    return x.as_strided(x.shape, strides) if count == 1 else x


def attend(queries, keys, strides):
    inputs = [rows(n, strides, seed) for seed, n in enumerate((queries, keys, keys))]

    def call(q, k, v, backend):
        return global_attention(q, k, v, num_heads=2, scale=0.3, backend=backend)

    return call, inputs


def attend_in_windows(strides):
    def call(q, k, v, backend):
        return local_attention(q, k, v, grid=(1, 1), window_size=1, num_heads=2, scale=0.3, backend=backend)

    return call, [rows(1, strides, seed) for seed in range(3)]


@pytest.mark.parametrize("strides", STRIDES.values(), ids=STRIDES)
@pytest.mark.parametrize("backend", ["cpu", "triton"])
@pytest.mark.parametrize("what", ["one key", "one query", "one pixel"])
def test_strides_of_single_rows_mean_nothing(what, backend, strides):
    sizes = {"one key": (5, 1), "one query": (1, 4)}
    call, inputs = attend(*sizes[what], strides) if what in sizes else attend_in_windows(strides)
    results = []
    for name in (backend, "reference"):
        leaves = [t.detach().requires_grad_() for t in inputs]
        assert all(t.is_contiguous() for t in leaves)
        y = call(*leaves, name)
        grad = rows(y.shape[1], strides, 7)
        results.append([y.detach(), *torch.autograd.grad(y, leaves, grad)])
    for found, expected in zip(*results, strict=True):
        assert float((found - expected).norm()) <= 1e-5 * max(float(expected.norm()), 1.0)
    with torch.no_grad():
        assert relative_l2(call(*inputs, backend), results[1][0]) <= 1e-5


@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_no_queries_have_no_statistics(backend):
    keys = rows(4, None, 1)
    call = {"num_heads": 2, "scale": 0.3, "return_statistics": True, "backend": backend}
    out, statistics = global_attention(keys[:, :0], keys, keys, **call)
    assert out.shape == (BATCH, 0, CHANNELS) and statistics.shape == (BATCH, 2) and statistics.isnan().all()
