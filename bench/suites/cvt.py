"""The suites `cvt_13` and `cvt_21`: whole classifiers; and the stages of all published CvT models."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fastvit_kernels.bench import flops
from fastvit_kernels.bench.cases import Case
from fastvit_kernels.bench.suites import patch_embedding
from fastvit_kernels.bench.suites.models import IMAGE, accelerated, images
from fastvit_kernels.bench.suites.operators import Stage
from fastvit_kernels.bench.suites.transformers_twins import Logits
from fastvit_kernels.models import create_model
from fastvit_kernels.models.cvt import ConvolutionalVisionTransformer
from fastvit_kernels.models.cvt_keys import from_transformers
from fastvit_kernels.nn import QuickGELU

MODELS = ("cvt_13", "cvt_21")
# CvT-21 differs from CvT-13 in depth alone.
PUBLISHED = (("cvt_13", 224), ("cvt_13", 384), ("cvt_w24", 384))


def cases(name: str, batch: int) -> list[Case]:
    """The one case of the suite `name`."""
    return [case(name, batch)]


def case(name: str, batch: int, size: int = IMAGE, **overrides: Any) -> Case:
    """A classifier on `size` x `size` images; `overrides` as `create_model` takes them."""
    return Case(
        suite=name,
        name=name,
        batch=batch,
        count=lambda: cost(_shapes(name, **overrides), batch, size),
        build=lambda: create_model(name, backend="reference", **overrides),
        make_inputs=lambda: (images(batch, size),),
        fuse=accelerated,
        attention=True,
        end_to_end=True,
        twin=_transformers_twin,
    )


def _shapes(name: str, **overrides: Any) -> ConvolutionalVisionTransformer:
    with torch.device("meta"):
        model = create_model(name, **overrides)
    assert isinstance(model, ConvolutionalVisionTransformer)
    return model


def _stage_modules(model: ConvolutionalVisionTransformer) -> list[Any]:
    return [model.get_submodule(f"stage{index}") for index in range(model.num_stages)]


def cost(model: ConvolutionalVisionTransformer, batch: int, size: int) -> flops.Cost:
    """Of a classifier as it is configured, with the attention's usual 3 x 3 filters and halved keys."""
    embeddings = [stage.patch_embed.proj for stage in _stage_modules(model)]
    mlps = [stage.blocks[0].mlp for stage in _stage_modules(model)]
    return flops.cvt(
        batch,
        (size, size),
        dims=[conv.out_channels for conv in embeddings],
        depths=[len(stage.blocks) for stage in _stage_modules(model)],
        hidden=[mlp.fc1.out_features for mlp in mlps],
        patch_sizes=[conv.kernel_size[0] for conv in embeddings],
        patch_strides=[conv.stride[0] for conv in embeddings],
        patch_paddings=[conv.padding[0] for conv in embeddings],
        prefix_tokens=[int(stage.cls_token is not None) for stage in _stage_modules(model)],
        in_channels=model.in_chans,
        num_classes=model.num_classes,
    )


def stages() -> list[Stage]:
    """Every stage of the published models."""
    found = []
    for name, size in PUBLISHED:
        grid = (size, size)
        for index, module in enumerate(_stage_modules(_shapes(name)), start=1):
            conv = module.patch_embed.proj
            stage = Stage(
                name=f"{name}-{size}-stage{index}",
                in_channels=conv.in_channels,
                in_grid=grid,
                kernel=conv.kernel_size[0],
                stride=conv.stride[0],
                padding=conv.padding[0],
                channels=conv.out_channels,
                num_heads=module.blocks[0].attn.num_heads,
                num_prefix_tokens=int(module.cls_token is not None),
            )
            found.append(stage)
            grid = stage.grid
    return found


def embeddings() -> list[patch_embedding.Shape]:
    """The convolution in front of every stage."""
    return [patch_embedding.Shape(*stage[:7]) for stage in stages()]


def _transformers_twin(stock: nn.Module) -> nn.Module:
    """transformers' model with the same weights, and with the official activation in place of its exact GELU."""
    from transformers import CvtConfig, CvtForImageClassification
    from transformers.models.cvt.modeling_cvt import CvtIntermediate

    assert isinstance(stock, ConvolutionalVisionTransformer)
    stages = _stage_modules(stock)
    embeddings = [stage.patch_embed.proj for stage in stages]
    config = CvtConfig(
        num_channels=stock.in_chans,
        patch_sizes=[conv.kernel_size[0] for conv in embeddings],
        patch_stride=[conv.stride[0] for conv in embeddings],
        patch_padding=[conv.padding[0] for conv in embeddings],
        embed_dim=[conv.out_channels for conv in embeddings],
        num_heads=[stage.blocks[0].attn.num_heads for stage in stages],
        depth=[len(stage.blocks) for stage in stages],
        cls_token=[stage.cls_token is not None for stage in stages],
        num_labels=stock.num_classes,
    )
    twin = CvtForImageClassification(config)
    for module in twin.modules():
        if isinstance(module, CvtIntermediate):
            module.activation = QuickGELU()
    weights = stock.state_dict()
    with torch.no_grad():
        for name, tensor in from_transformers(twin.state_dict()).items():
            tensor.copy_(weights[name])
    return Logits(twin)
