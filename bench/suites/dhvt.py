"""The suites `dhvt_tiny_cifar_patch4` to `dhvt_small_imagenet_patch16`: whole classifiers; and their blocks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastvit_kernels.bench import flops, plain_dhvt
from fastvit_kernels.bench.cases import Case
from fastvit_kernels.bench.suites import depthwise_mlp, head_tokens, query_attention
from fastvit_kernels.bench.suites.models import accelerated, images, ours

MODELS = tuple(plain_dhvt.VARIANTS)
# The order of the blocks; results of the first are published under their names.
_FIRST = ("dhvt_small_imagenet_patch16", "dhvt_small_cifar_patch4", "dhvt_small_cifar_patch2")
PUBLISHED = tuple(dict.fromkeys((*_FIRST, *MODELS)))


def cases(name: str, batch: int) -> list[Case]:
    """The one case of the suite `name`."""
    return [case(name, batch)]


def case(name: str, batch: int, **overrides: Any) -> Case:
    """A classifier; `overrides` of the plain model's sizes."""
    sizes = {**plain_dhvt.VARIANTS[name], **overrides}
    side, same = sizes["side"], {key: value for key, value in sizes.items() if key in ("depth", "num_classes")}

    def build() -> nn.Module:
        return plain_dhvt.DHVT(**sizes)

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
        fuse=lambda plain: accelerated(ours(name, plain, **same)),
        settle=_settle,
        attention=True,
        end_to_end=True,
    )


def _settle(plain: nn.Module) -> None:
    """Affines around the identity, as they are initialised."""
    for module in plain.modules():
        if isinstance(module, plain_dhvt.Affine):
            module.alpha.add_(1.0)


def _shapes() -> list[tuple[str, tuple[int, int], int, int]]:
    """Name, grid, channels and heads; all blocks of a model are alike."""
    found = []
    for name in PUBLISHED:
        sizes = plain_dhvt.VARIANTS[name]
        side = sizes["side"] // sizes["patch"]
        found.append((name, (side, side), sizes["dim"], sizes["heads"]))
    return found


def heads() -> list[head_tokens.Shape]:
    """What the same models put in front of their attentions."""
    return [head_tokens.Shape(name, flops.tokens(grid, 1), dim, count) for name, grid, dim, count in _shapes()]


def mlps() -> list[depthwise_mlp.Shape]:
    """Those of every model."""
    return [depthwise_mlp.Shape(name, depthwise_mlp.DHVT, grid, dim, 4 * dim) for name, grid, dim, _ in _shapes()]


def attentions() -> list[query_attention.Shape]:
    """Those of every model: patches, class token and a token for each head."""
    found = []
    for name, grid, dim, heads in _shapes():
        rows = flops.tokens(grid, 1) + heads
        found.append(query_attention.Shape(name, rows, rows, dim, heads, norm=None, residual=False))
    return found
