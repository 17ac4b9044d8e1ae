"""The public names. A name leaves these lists only through a deprecation."""

from __future__ import annotations

import importlib

import pytest

SURFACE = {
    "fastvit_kernels": [
        "BackendError",
        "Explanation",
        "Info",
        "Report",
        "__version__",
        "accelerate",
        "explain",
        "info",
        "ops",
        "restore",
        "use_backend",
        "use_recompute",
        "use_taping",
    ],
    "fastvit_kernels.models": [
        "CheckpointError",
        "CheckpointReport",
        "create_model",
        "image_size",
        "list_models",
        "load_checkpoint",
        "register",
    ],
    "fastvit_kernels.nn": [
        "ConvProjectionAttention",
        "DAFF",
        "DenseConv2d",
        "DenseLinear",
        "DropPath",
        "HIMHSA",
        "HatMLP",
        "HierarchicalAttention",
        "IRFFN",
        "LMHSA",
        "LPU",
        "LayerNorm",
        "MixFFN",
        "PatchEmbedding",
        "PointwiseMLP",
        "QuickGELU",
        "SpatialReductionAttention",
    ],
    "fastvit_kernels.ops": [
        "BatchNorm",
        "Projection",
        "batch_norm_act",
        "conv_projection",
        "depthwise_conv",
        "depthwise_mlp",
        "global_attention",
        "head_tokens",
        "local_attention",
        "merge_head_tokens",
        "patch_embedding",
        "pointwise_mlp",
        "pooled_projection",
    ],
}


@pytest.mark.parametrize("module", SURFACE)
def test_public_names(module):
    found = importlib.import_module(module)
    assert sorted(found.__all__) == SURFACE[module]
    assert all(hasattr(found, name) for name in SURFACE[module])
