"""timm's Twins: the positional encoding behind a stage's first block, on the fused operator."""

from __future__ import annotations

from typing import Any

import torch
from timm.models import twins as host
from torch import Tensor, nn

from fastvit_kernels.integrations.adapter import Adapter, repeated, state_of
from fastvit_kernels.nn import fused
from fastvit_kernels.ops.arguments import compute_dtype


class FusedTwinsPosConv(host.PosConv):
    """`PosConv` on `depthwise_conv`."""

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """`[B, H*W, C]` to `[B, H'*W', C]`, `size` being `(H, W)`."""
        height, width = size
        return repeated(self, _compute, x, height, width)


def _compute(module: host.PosConv, x: Tensor, height: int, width: int) -> Tensor:
    if _convolution_obstacles(module):
        return host.PosConv.forward(module, x, (height, width))
    return _encode(module, x, (height, width))


def _encode(module: host.PosConv, x: Tensor, grid: tuple[int, int]) -> Tensor:
    state = state_of(module)
    out = fused.depthwise_conv(
        x,
        grid,
        module.proj[0],
        residual=x if module.stride == 1 else None,
        packed=None if state.packed is None else state.packed["depthwise_conv"],
        backend=state.backend,
    )
    # timm adds x to the convolution's result in place: under autocast in autocast's dtype.
    return out.to(compute_dtype(x))


def _convolution_obstacles(module: Any) -> list[str]:
    proj = module._modules["proj"]
    if type(proj) is not nn.Sequential or len(proj) != 1 or fused.has_hooks(proj):
        return ["proj is not the one convolution that timm puts there"]
    conv: Any = proj[0]
    reasons = fused.about("the convolution", fused.filter_obstacles(conv))
    if not reasons and (conv.kernel_size, conv.padding) != ((3, 3), (1, 1)):
        reasons.append("the convolution is not 3 x 3 with padding 1")
    return reasons


def _obstacles(module: Any) -> list[str]:
    replaced = ["its forward was replaced on the instance"] if "forward" in module.__dict__ else []
    return _convolution_obstacles(module) + replaced


def _pack(module: Any) -> None:
    """Run once on a map of one pixel: packing needs a call, and any size will do."""
    with torch.no_grad():
        weight = module.proj[0].weight
        _encode(module, weight.new_zeros((1, 1, weight.shape[0])), (1, 1))


ADAPTER = Adapter(host.PosConv, FusedTwinsPosConv, ("depthwise_conv",), _obstacles, _convolution_obstacles, _pack)
