"""Attention in windows of the published models: HAT-Net's, and those of Twins and Swin, which are other libraries'."""

from __future__ import annotations

from fastvit_kernels.bench.suites import hat_net, twins
from fastvit_kernels.bench.suites.local_attention import Shape
from fastvit_kernels.bench.suites.models import IMAGE

WINDOW = 7
# Side of the image over the map's, channels and heads of each stage. All blocks without shift of a stage are alike.
SWIN_TINY = ((4, 96, 3), (8, 192, 6), (16, 384, 12), (32, 768, 24))


def of_hat_net() -> list[Shape]:
    """The first level of every stage; in a stage of one level all of its attention, with the output projection."""
    return [
        Shape(
            stage.name,
            stage.grid,
            stage.channels,
            stage.num_heads,
            window=stage.window if stage.window > 1 else stage.grid[0],
            projection=stage.window == 1,
        )
        for stage in hat_net.stages()
    ]


def of_twins() -> list[Shape]:
    return [_layer_norm(f"twins_svt_small-stage{n}", *sizes[:3]) for n, sizes in enumerate(twins.SVT_SMALL, start=1)]


def of_swin() -> list[Shape]:
    """With the bias of relative positions, 7 x 7."""
    return [
        _layer_norm(f"swin_tiny-stage{n}", *sizes)._replace(bias=True) for n, sizes in enumerate(SWIN_TINY, start=1)
    ]


def _layer_norm(name: str, reduction: int, channels: int, num_heads: int) -> Shape:
    side = IMAGE // reduction
    return Shape(name, (side, side), channels, num_heads, WINDOW, norm="layer", projection=True, statistics=False)
