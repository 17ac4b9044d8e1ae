"""What timm's Twins computes, at its published sizes."""

from __future__ import annotations

from fastvit_kernels.bench.suites import query_attention
from fastvit_kernels.bench.suites.models import IMAGE

# Side of the image over the map's, channels, heads, and side of a square that makes one key of the attention to few
# keys. All blocks of a kind in a stage are alike.
SVT_SMALL = ((4, 64, 2, 8), (8, 128, 4, 4), (16, 256, 8, 2), (32, 512, 16, 1))


def attentions() -> list[query_attention.Shape]:
    """Those of Twins-SVT-S to the reduced map, by stage."""
    found = []
    for number, (reduction, channels, heads, square) in enumerate(SVT_SMALL, start=1):
        side = IMAGE // reduction
        name = f"twins_svt_small-stage{number}"
        found.append(query_attention.Shape(name, side**2, (side // square) ** 2, channels, heads))
    return found
