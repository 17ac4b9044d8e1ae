"""patch_embedding: the contract, its formula in plain PyTorch, and its messages."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fastvit_kernels.ops import patch_embedding
from fastvit_kernels.testing import inputs
from fastvit_kernels.testing.contract import Contract, Rejection


def plain_pytorch(
    x,
    weight,
    bias,
    stride,
    padding,
    norm_weight=None,
    norm_bias=None,
    norm_eps=None,
    in_norm_weight=None,
    in_norm_bias=None,
    in_norm_eps=None,
):
    if in_norm_eps is not None:
        rows = F.layer_norm(x.permute(0, 2, 3, 1), (x.shape[1],), in_norm_weight, in_norm_bias, in_norm_eps)
        x = rows.permute(0, 3, 1, 2)
    maps = F.conv2d(x, weight, bias, stride, padding)
    if norm_eps is None:
        return maps
    return F.layer_norm(maps.permute(0, 2, 3, 1), (len(weight),), norm_weight, norm_bias, norm_eps).permute(0, 3, 1, 2)


class TestPatchEmbedding(Contract, Rejection):
    cases = inputs.PATCH_EMBEDDING
    fused = ("patch_embedding",)
    equivalent = staticmethod(plain_pytorch)
    resizable = frozenset({("x", 0), ("x", 2), ("x", 3)})
    reshaped = (
        [
            inputs.patch_embedding_case("small", batch=2, size=(9, 11)),
            inputs.patch_embedding_case("other", batch=3, size=(6, 4)),
            inputs.patch_embedding_case("large", batch=5, size=(12, 20)),
        ],
        {"x": (0, 2, 3)},
    )


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.zeros(6, 9, 11)}, ValueError, r"x: expected 4 dimensions, got shape \(6, 9, 11\)"),
        ({"x": torch.zeros(2, 5, 9, 11)}, ValueError, r"weight: expected shape \(16, 5, 3, 3\), got \(16, 6, 3, 3\)"),
        ({"x": torch.zeros(2, 6, 0, 11)}, ValueError, "x: a 3 x 3 filter is larger than the padded"),
        ({"weight": torch.zeros(16, 6, 3)}, ValueError, r"weight: expected \[C_out, C, K, K\], got shape \(16, 6, 3\)"),
        ({"weight": torch.zeros(16, 6, 3, 2)}, ValueError, r"weight: expected shape \(16, 6, 2, 2\)"),
        ({"weight": torch.zeros(16, 6, 20, 20)}, ValueError, "x: a 20 x 20 filter is larger than the padded"),
        ({"bias": torch.zeros(6)}, ValueError, r"bias: expected shape \(16,\), got \(6,\)"),
        ({"norm_weight": torch.zeros(6)}, ValueError, r"norm_weight: expected shape \(16,\), got \(6,\)"),
        ({"norm_eps": None}, ValueError, "norm_eps: expected the LayerNorm's epsilon .* got None"),
        ({"norm_eps": float("inf")}, ValueError, "norm_eps: expected a finite number in .*, got inf"),
        ({"stride": 0}, ValueError, "stride: expected an integer of at least 1, got 0"),
        ({"stride": (2, 2)}, TypeError, "stride: expected an integer, got tuple"),
        ({"padding": -1}, ValueError, "padding: expected an integer of at least 0, got -1"),
        ({"padding": "same"}, TypeError, "padding: expected an integer, got str"),
    ],
)
def test_bad_arguments(change, error, message):
    arguments = inputs.tagged(inputs.PATCH_EMBEDDING, "smallest")[0].call().arguments
    with pytest.raises(error, match=message):
        patch_embedding(**{**arguments, **change})
