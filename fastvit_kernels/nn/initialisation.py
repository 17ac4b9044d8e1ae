"""How the pyramid transformers' official code fills its layers."""

from __future__ import annotations

from torch import nn


def initialise(module: nn.Module) -> None:
    """Fill a linear or a convolution as PVTv2 and SegFormer do; to other modules nothing happens.

    Linears get a truncated normal of standard deviation 0.02, convolutions a normal whose variance is two over the
    outputs that an input of one group reaches; biases get zeros.
    """
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
    elif isinstance(module, nn.Conv2d):
        fan_out = module.out_channels // module.groups * module.kernel_size[0] * module.kernel_size[1]
        nn.init.normal_(module.weight, std=(2.0 / fan_out) ** 0.5)
    else:
        return
    if module.bias is not None:
        nn.init.zeros_(module.bias)
