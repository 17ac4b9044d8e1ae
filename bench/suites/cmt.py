"""The suites `cmt_ti` to `cmt_b`: whole classifiers; and the stages of all published CMTs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastvit_kernels.bench import flops, plain_cmt
from fastvit_kernels.bench.cases import Case
from fastvit_kernels.bench.suites import depthwise_conv, depthwise_mlp, patch_embedding, query_attention
from fastvit_kernels.bench.suites.models import accelerated, images, ours

MODELS = tuple(plain_cmt.VARIANTS)
# The order of the stages; results of CMT-S's are published under their names.
PUBLISHED = tuple(dict.fromkeys(("cmt_s", *MODELS)))


def cases(name: str, batch: int) -> list[Case]:
    """The one case of the suite `name`."""
    return [case(name, batch)]


def case(name: str, batch: int, **overrides: Any) -> Case:
    """A classifier; `overrides` of the plain model's sizes."""
    sizes = {**plain_cmt.VARIANTS[name], **overrides}
    side, same = sizes["side"], {key: value for key, value in sizes.items() if key in ("depths", "num_classes")}

    def build() -> nn.Module:
        return plain_cmt.CMT(**sizes)

    def inputs() -> tuple[Tensor, ...]:
        return (images(batch, side),)

    def count() -> flops.Cost:
        with torch.device("meta"):
            return flops.counted(build().eval(), torch.empty(batch, 3, side, side))

    return Case(
        suite=name,
        name=name,
        batch=batch,
        count=count,
        build=build,
        make_inputs=inputs,
        fuse=lambda plain: accelerated(ours(name, plain, img_size=side, **same)),
        settle=_settle,
        attention=True,
        end_to_end=True,
    )


def _settle(plain: nn.Module) -> None:
    """Tables as large as they are initialised; a local perception that does not double the variance in every block."""
    for module in plain.modules():
        if isinstance(module, plain_cmt.Block):
            module.proj.weight.mul_(0.3)
    for name, parameter in plain.named_parameters():
        if name.startswith("relative_pos_"):
            parameter.normal_()


def _stages() -> list[tuple[str, tuple[int, int], nn.Conv2d, plain_cmt.Block]]:
    """Name, grid, the convolution in front, first block."""
    found = []
    for name in PUBLISHED:
        sizes = plain_cmt.VARIANTS[name]
        with torch.device("meta"):
            plain = plain_cmt.CMT(**{**sizes, "depths": (1, 1, 1, 1)})
        for index, letter in enumerate(plain_cmt.STAGES):
            side = sizes["side"] >> (2 + index)
            conv, block = getattr(plain, f"patch_embed_{letter}").proj, getattr(plain, f"blocks_{letter}")[0]
            found.append((f"{name}-stage{index + 1}", (side, side), conv, block))
    return found


def convolutions() -> list[depthwise_conv.Shape]:
    """The local perception and the reduction of keys, by stage."""
    found = []
    for name, grid, _, block in _stages():
        dim, ratio = block.norm1.weight.numel(), block.attn.reduction
        found.append(depthwise_conv.Shape(name, dim, grid))
        if ratio > 1:
            found.append(depthwise_conv.Shape(f"{name}-keys", dim, grid, ratio))
    return found


def mlps() -> list[depthwise_mlp.Shape]:
    """Those of every stage."""
    return [
        depthwise_mlp.Shape(name, depthwise_mlp.CMT, grid, block.norm2.weight.numel(), block.mlp.proj.in_channels)
        for name, grid, _, block in _stages()
    ]


def attentions() -> list[query_attention.Shape]:
    """Those of every stage."""
    found = []
    for name, grid, _, block in _stages():
        keys = flops.tokens(grid) // block.attn.reduction**2
        sizes = (flops.tokens(grid), keys, block.norm1.weight.numel(), block.attn.heads)
        found.append(query_attention.Shape(name, *sizes, separate_values=True, table=True))
    return found


def embeddings() -> list[patch_embedding.Shape]:
    """Those of every stage."""
    return [
        patch_embedding.Shape(name, conv.in_channels, (2 * height, 2 * width), 2, 2, 0, conv.out_channels)
        for name, (height, width), conv, _ in _stages()
    ]
