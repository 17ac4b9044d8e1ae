"""patch_embedding: the contract, its formula in plain PyTorch, and its messages."""

from __future__ import annotations

import torch.nn.functional as F

from fastvit_kernels.testing import inputs
from fastvit_kernels.testing.contract import Contract, Rejection


def plain_pytorch(x, weight, bias, stride, padding, norm_weight=None, norm_bias=None, norm_eps=None):
    maps = F.conv2d(x, weight, bias, stride, padding)
    if norm_eps is None:
        return maps
    return F.layer_norm(maps.permute(0, 2, 3, 1), (len(weight),), norm_weight, norm_bias, norm_eps).permute(0, 3, 1, 2)


class TestPatchEmbedding(Contract, Rejection):
    cases = inputs.PATCH_EMBEDDING
    fused = ("patch_embedding",)
    precisions = {"cpu": Contract.precisions["cpu"]}
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
