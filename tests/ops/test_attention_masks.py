"""Biases that mask keys: minus infinity and the lowest finite number, wherever they stand."""

from __future__ import annotations

import pytest
import torch

from fastvit_kernels.ops import global_attention, local_attention

MASKS = [-torch.inf, torch.finfo(torch.float32).min]


def _masked(rows, keys, masked, fill):
    """Row 0 is masked at the first keys, row 1 but for the last key, row 2 wholly."""
    bias = torch.zeros(1, rows, keys)
    bias[:, :, :masked] = fill
    bias[:, 1, :-1] = fill
    bias[:, 2] = fill
    return bias


def _assert_same(found, expected):
    assert torch.equal(found.isnan(), expected.isnan())
    assert not expected[:, :2].isnan().any()
    torch.testing.assert_close(found.nan_to_num(), expected.nan_to_num(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", ["cpu", "triton"])
@pytest.mark.parametrize("fill", MASKS)
@pytest.mark.parametrize(("keys", "masked"), [(20, 7), (600, 256), (600, 520)])
def test_global_attention(keys, masked, fill, backend):
    torch.manual_seed(0)
    q, k, v = torch.randn(1, 3, 16), torch.randn(1, keys, 16), torch.randn(1, keys, 16)
    options = {"num_heads": 1, "scale": 0.25, "attn_bias": _masked(3, keys, masked, fill)}
    _assert_same(
        global_attention(q, k, v, **options, backend=backend), global_attention(q, k, v, **options, backend="reference")
    )


@pytest.mark.parametrize("backend", ["cpu", "triton"])
@pytest.mark.parametrize("fill", MASKS)
@pytest.mark.parametrize(("window", "masked"), [(4, 5), (18, 256)])
def test_local_attention(window, masked, fill, backend):
    torch.manual_seed(0)
    x, area = torch.randn(1, window**2, 48), window**2
    options = {"num_heads": 1, "scale": 0.25, "attn_bias": _masked(area, area, masked, fill)}
    options |= {"grid": (window, window), "window_size": window}
    _assert_same(local_attention(x, **options, backend=backend), local_attention(x, **options, backend="reference"))
