"""What timm's EfficientFormerV2 computes, at its published sizes."""

from __future__ import annotations

from fastvit_kernels.bench.suites import depthwise_mlp
from fastvit_kernels.bench.suites.models import IMAGE

# Channels by stage. In the last two stages some blocks have MLPs of a smaller ratio.
CHANNELS = {
    "s0": (32, 48, 96, 176),
    "s1": (32, 48, 120, 224),
    "s2": (32, 64, 144, 288),
    "l": (40, 80, 192, 384),
}
RATIOS = ((4,), (4,), (4, 3), (4, 3))


def mlps() -> list[depthwise_mlp.Shape]:
    """Those of efficientformerv2_s0 to efficientformerv2_l: neither norm nor residual is within the MLP."""
    found = []
    for size, widths in CHANNELS.items():
        for index, (channels, ratios) in enumerate(zip(widths, RATIOS, strict=True)):
            side = IMAGE >> (2 + index)
            for ratio in ratios:
                name = f"efficientformerv2_{size}-stage{index + 1}" + ("" if ratio == ratios[0] else f"-ratio{ratio}")
                sizes = ((side, side), channels, ratio * channels)
                found.append(depthwise_mlp.Shape(name, depthwise_mlp.EFFICIENTFORMER_V2, *sizes))
    return found
