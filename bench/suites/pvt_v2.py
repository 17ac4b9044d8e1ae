"""The suites `pvt_v2_*`, `mit_*` and `segformer_*`: whole models; and the stages of all of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastvit_kernels.bench import flops, plain_pvt_v2
from fastvit_kernels.bench.cases import Case
from fastvit_kernels.bench.suites import depthwise_mlp, patch_embedding, query_attention
from fastvit_kernels.bench.suites.models import accelerated, images, ours
from fastvit_kernels.bench.suites.transformers_twins import pyramid_twin
from fastvit_kernels.models import image_size

MODELS = tuple(plain_pvt_v2.VARIANTS)
# The order of the stages; results of the first are published under their names.
PUBLISHED = tuple(dict.fromkeys(("pvt_v2_b2", "mit_b0", *MODELS)))


def cases(name: str, batch: int) -> list[Case]:
    """The one case of the suite `name`."""
    return [case(name, batch)]


def case(name: str, batch: int, size: int | None = None, **overrides: Any) -> Case:
    """A model on square images of `size` pixels; `overrides` of the plain model's sizes."""
    side = size or image_size(name)
    sizes = {**plain_pvt_v2.VARIANTS[name], **overrides}
    same = {key: value for key, value in sizes.items() if key in ("depths", "num_classes")}

    def inputs() -> tuple[Tensor, ...]:
        return (images(batch, side),)

    return Case(
        suite=name,
        name=name,
        batch=batch,
        count=lambda: cost(name, sizes, batch, side),
        build=lambda: _plain(name, sizes),
        make_inputs=inputs,
        fuse=lambda model: accelerated(ours(name, model, eps="transformers", **same) if _is_plain(model) else model),
        attention=True,
        end_to_end=True,
        twin=(lambda plain: pyramid_twin(name, plain, same)) if _has_twin(sizes) else None,
    )


def _has_twin(sizes: dict[str, Any]) -> bool:
    """Whether `pyramid_twin` can say it in transformers' configuration: neither linear attention nor a wide head."""
    return not sizes.get("linear", False) and sizes.get("decoder_dim", 256) == 256


def _plain(name: str, sizes: dict[str, Any]) -> nn.Module:
    return (plain_pvt_v2.SegFormer if name.startswith("segformer") else plain_pvt_v2.PVTv2)(**sizes)


def _is_plain(model: nn.Module) -> bool:
    return isinstance(model, (plain_pvt_v2.PVTv2, plain_pvt_v2.SegFormer))


def cost(name: str, sizes: dict[str, Any], batch: int, side: int) -> flops.Cost:
    """Of a model as it is published, but for SegFormer's head.

    Its linears and its joining convolution may be exchanged with the enlarging of the maps, and need fewer
    multiply-adds then: the floor is that of the fewer.
    """
    with torch.device("meta"):
        plain, image = _plain(name, sizes).eval(), torch.empty(batch, 3, side, side)
        found = flops.counted(plain, image)
        if not isinstance(plain, plain_pvt_v2.SegFormer):
            return found
        backbone = flops.macs(plain.backbone.stages, image)
        maps = plain.backbone.stages(image)
    width, classes = sizes["decoder_dim"], sizes["num_classes"]
    head = sum(x.numel() * width for x in maps) + maps[0][:, 0].numel() * width * classes
    return flops.Cost(backbone + head, found.weights, found.activations)


def _stages() -> list[tuple[str, tuple[int, int], tuple[int, int], Any, Any]]:
    """Name, grid in front of and behind the patch embedding, patch embedding, first block."""
    found = []
    for name in PUBLISHED:
        with torch.device("meta"):
            plain = _plain(name, {**plain_pvt_v2.VARIANTS[name], "depths": (1, 1, 1, 1)})
        plain = plain.backbone if isinstance(plain, plain_pvt_v2.SegFormer) else plain
        grid = (image_size(name),) * 2
        for index in range(1, 5):
            embedding, block = getattr(plain, f"patch_embed{index}"), getattr(plain, f"block{index}")[0]
            conv = embedding.proj
            out = flops.output_grid(grid, conv.kernel_size[0], conv.stride[0], conv.padding[0])
            found.append((f"{name}-stage{index}", grid, out, embedding, block))
            grid = out
    return found


def mlps() -> list[depthwise_mlp.Shape]:
    """Those of every stage."""
    found = []
    for name, _, grid, _, block in _stages():
        family = depthwise_mlp.PVT_V2_LINEAR if block.mlp.linear else depthwise_mlp.PVT_V2
        found.append(depthwise_mlp.Shape(name, family, grid, block.mlp.fc1.in_features, block.mlp.fc1.out_features))
    return found


def attentions() -> list[query_attention.Shape]:
    """Those behind the reduction of every stage."""
    found = []
    for name, _, grid, _, block in _stages():
        pooled = flops.tokens((plain_pvt_v2.POOLED,) * 2)
        keys = pooled if block.attn.linear else flops.tokens(grid) // block.attn.reduction**2
        sizes = (flops.tokens(grid), keys, block.attn.q.in_features, block.attn.heads)
        found.append(query_attention.Shape(name, *sizes))
    return found


def embeddings() -> list[patch_embedding.Shape]:
    """Those of every stage, and the reductions of keys and values with the norm in front; of a pooled map, without."""
    found = []
    for name, before, grid, embedding, block in _stages():
        conv, reduction = embedding.proj, block.attn.reduction
        sizes = (conv.kernel_size[0], conv.stride[0], conv.padding[0], conv.out_channels)
        found.append(patch_embedding.Shape(name, conv.in_channels, before, *sizes))
        dim, pooled = conv.out_channels, (plain_pvt_v2.POOLED,) * 2
        if block.attn.linear:
            found.append(patch_embedding.Shape(f"{name}-keys", dim, pooled, 1, 1, 0, dim))
        elif reduction > 1:
            found.append(patch_embedding.Shape(f"{name}-keys", dim, grid, reduction, reduction, 0, dim, in_norm=True))
    return found
