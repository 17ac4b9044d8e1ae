"""timm's EfficientFormerV2: its MLP, a depthwise convolution between two pointwise ones, on the fused operator.

Layer scale, drop path and residual stay timm's.
"""

from __future__ import annotations

import torch
from timm.layers import BatchNormAct2d, ConvNormAct
from timm.models import efficientformer_v2 as host
from torch import Tensor, nn

from fastvit_kernels.integrations.adapter import Adapter, repeated, state_of
from fastvit_kernels.integrations.structure import child, code_obstacles, in_evaluation, own_parameters_obstacles
from fastvit_kernels.integrations.timm_parts import activation
from fastvit_kernels.nn import fused
from fastvit_kernels.nn.fused_depthwise import DepthwiseMLPParts, depthwise_mlp, depthwise_mlp_obstacles

_CODE = {
    ("fc1",): ConvNormAct,
    ("fc1", "bn"): BatchNormAct2d,
    ("fc1", "bn", "drop"): nn.Identity,
    ("mid", "bn"): BatchNormAct2d,
    ("mid", "bn", "drop"): nn.Identity,
    ("fc2",): host.ConvNorm,
}


class FusedConvMlpWithNorm(host.ConvMlpWithNorm):
    """`ConvMlpWithNorm` with `mid_conv` on `depthwise_mlp`.

    What the operator cannot express as things are now (a dropout at work, a hook that was added) runs timm's modules.
    """

    def forward(self, x: Tensor) -> Tensor:
        """`[B, C, H, W]` to `[B, C_out, H, W]`, here in channels-last memory."""
        return repeated(self, _compute, x)


def _compute(mlp: host.ConvMlpWithNorm, x: Tensor) -> Tensor:
    return host.ConvMlpWithNorm.forward(mlp, x) if _obstacles_now(mlp) else mlp.drop2(_fuse(mlp, x))


def _fuse(mlp: host.ConvMlpWithNorm, x: Tensor) -> Tensor:
    state = state_of(mlp)
    grid = (x.shape[2], x.shape[3])
    out: Tensor = depthwise_mlp(
        x.permute(0, 2, 3, 1).flatten(1, 2),
        grid,
        _parts(mlp)._replace(bn1=mlp.fc1.bn, bn2=mlp.mid.bn, bn3=mlp.fc2.bn),
        packed=None if state.packed is None else state.packed["depthwise_mlp"],
        backend=state.backend,
    )
    return out.transpose(1, 2).unflatten(2, grid)


def _parts(mlp: host.ConvMlpWithNorm) -> DepthwiseMLPParts:
    """Without the batch norms, which are timm's."""
    return DepthwiseMLPParts(
        mlp.fc1.conv,
        mlp.mid.conv,
        activation(mlp.mid.bn.act),
        mlp.fc2.conv,
        hidden_act=activation(mlp.fc1.bn.act),
    )


def _obstacles_now(mlp: host.ConvMlpWithNorm, lasting: bool = False) -> list[str]:
    """Why the operator cannot be used now; with `lasting` a dropout that is merely at work does not count."""
    if type(mlp.mid) is nn.Identity:
        return ["it has no convolution in the middle (mid_conv), so there is nothing to fuse"]
    if reasons := code_obstacles(mlp, {("mid",): ConvNormAct}) or code_obstacles(mlp, _CODE):
        return reasons
    for name in ("fc1", "mid"):
        if child(mlp, (name, "aa")) is not None:
            reasons.append(f"{name} has an anti-aliasing layer")
        reasons += fused.about(f"{name}'s batch norm", own_parameters_obstacles(mlp._modules[name].bn))
    reasons += fused.about("fc2's batch norm", fused.batch_norm_obstacles(mlp.fc2.bn))
    if not reasons and len({fused.uses_batch_statistics(part.bn) for part in (mlp.fc1, mlp.mid, mlp.fc2)}) > 1:
        reasons.append("the batch norms are in different modes")
    return reasons + depthwise_mlp_obstacles(_parts(mlp)._replace(dropouts=(in_evaluation(mlp.drop1, lasting),)))


def _obstacles(mlp: nn.Module) -> list[str]:
    replaced = ["its forward was replaced on the instance"] if "forward" in mlp.__dict__ else []
    return _obstacles_now(mlp, lasting=True) + replaced


def _pack(mlp: host.ConvMlpWithNorm) -> None:
    """Run once on a single pixel: packing needs a call, and any will do."""
    if not _obstacles_now(mlp):
        weight = mlp.fc1.conv.weight
        with torch.no_grad():
            _fuse(mlp, weight.new_zeros((1, weight.shape[1], 1, 1)))


ADAPTER = Adapter(
    host=host.ConvMlpWithNorm,
    fused=FusedConvMlpWithNorm,
    operators=("depthwise_mlp",),
    obstacles=_obstacles,
    unfused=_obstacles_now,
    pack=_pack,
)
