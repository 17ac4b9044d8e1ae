"""A dense convolution that keeps its weights packed between calls."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastvit_kernels import ops
from fastvit_kernels.nn import checks, fused
from fastvit_kernels.nn.fused_depthwise import activation_name
from fastvit_kernels.ops import dispatch
from fastvit_kernels.ops.arguments import check_flag, compute_dtype
from fastvit_kernels.ops.native import cpu_reasons
from fastvit_kernels.ops.packing import PackedWeights

# Scale and shift of each channel, `[C]` both.
Affine = tuple[Tensor, Tensor]


class DenseConv2d(nn.Conv2d):
    """`nn.Conv2d`; prepared for inference it runs on `ops.patch_embedding`, whose weights are packed once.

    At batch 1 the small maps behind a few strided convolutions cost PyTorch less than bringing the filters into its
    layout, which it does at every call. Only that case is fused: while training, and on filters that the operator does
    not know (`fusion_obstacles` lists why), this is the convolution it derives from. What stands around it goes through
    `ops.batch_norm_act` where gradients are recorded on a CPU in fp32 or bf16, but for exports and torch.func: a batch
    norm and an activation behind it as one operator, and a scale and shift in front.

    Args: those of `nn.Conv2d`.

    Attributes:
        backend: runs the operator on one backend; None for the usual choice.
    """

    backend: str | None = None
    _packed: PackedWeights | None = None

    def forward(
        self,
        input: Tensor,
        *,
        act: nn.Module | None = None,
        bn: nn.BatchNorm2d | None = None,
        bn_after_activation: bool = False,
        before: Affine | None = None,
        behind: Affine | None = None,
    ) -> Tensor:
        """`behind(act(bn(conv(before(input)))))`; without the optional arguments the convolution's own forward.

        Args:
            input: `[B, in_channels, H, W]`, best in channels-last memory.
            act, bn: modules to apply to the result, fused where possible.
            bn_after_activation: `bn` stands behind `act`, not in front of it.
            before, behind: scale and shift of the input's channels, and of those of the result behind `act` and `bn`.

        Returns:
            `[B, out_channels, H', W']`.
        """
        check_flag("bn_after_activation", bn_after_activation)
        # PyTorch takes a map without a batch as well.
        usable = self._packed is not None and isinstance(input, Tensor) and input.ndim == 4
        if not usable or torch.is_grad_enabled() or self.fusion_obstacles(act, bn):
            maps = super().forward(_in_front(input, before, self.backend))
            return _scaled(_behind(maps, act, bn, bn_after_activation, self.backend), behind)
        checks.check_map("input", input, self.in_channels)
        weight, bias = self._parameters["weight"], self._parameters["bias"]
        assert weight is not None and isinstance(self.padding[0], int)
        in_scale, in_shift = before or (None, None)
        out_scale, out_shift = behind or (None, None)
        return ops.patch_embedding(
            input,
            weight,
            bias,
            stride=self.stride[0],
            padding=self.padding[0],
            activation=None if act is None else activation_name(act),
            bn=None if bn is None else fused.batch_norm_of(bn),
            bn_after_activation=bn_after_activation,
            in_scale=in_scale,
            in_shift=in_shift,
            out_scale=out_scale,
            out_shift=out_shift,
            packed=self._packed,
            backend=self.backend,
        )

    def fusion_obstacles(self, act: nn.Module | None = None, bn: nn.BatchNorm2d | None = None) -> list[str]:
        """Every reason why `forward` would call PyTorch's modules even when prepared for inference."""
        reasons = fused.dense_conv_obstacles(self) + _obstacles_behind(act, bn)
        if not reasons and bn is not None and fused.uses_batch_statistics(bn):
            reasons.append("the batch norm is training")
        return reasons

    def prepare_inference(self, enabled: bool) -> None:
        """Keep the weights in the layout of the CPU kernels between calls (`enabled`), or stop doing so."""
        self._packed = PackedWeights() if enabled else None


def convolve(
    conv: nn.Conv2d,
    input: Tensor,
    *,
    act: nn.Module | None = None,
    bn: nn.BatchNorm2d | None = None,
    bn_after_activation: bool = False,
    before: Affine | None = None,
    behind: Affine | None = None,
) -> Tensor:
    """A convolution and what stands around it, handed to the convolution where nobody can tell the difference."""
    if isinstance(conv, DenseConv2d) and not fused.has_hooks(conv):
        return conv(input, act=act, bn=bn, bn_after_activation=bn_after_activation, before=before, behind=behind)
    backend = getattr(conv, "backend", None)
    return _scaled(_behind(conv(_in_front(input, before, backend)), act, bn, bn_after_activation, backend), behind)


def _scaled(maps: Tensor, affine: Affine | None) -> Tensor:
    if affine is None:
        return maps
    scale, shift = affine
    return torch.addcmul(shift.view(-1, 1, 1), maps, scale.view(-1, 1, 1))


def _in_front(maps: Tensor, affine: Affine | None, backend: str | None) -> Tensor:
    if affine is None or not _has_kernels(maps, backend):
        return _scaled(maps, affine)
    scale, shift = affine
    if not (maps.dtype is scale.dtype is shift.dtype and scale.shape == shift.shape == maps.shape[1:2]):
        return _scaled(maps, affine)
    # A batch norm by statistics that change nothing. PyTorch takes long for sums over the pixels of a few channels.
    bn = ops.BatchNorm(scale, shift, torch.zeros_like(scale), torch.ones_like(scale), eps=0.0)
    return of_pixels(maps, bn, backend=backend)


def of_pixels(maps: Tensor, bn: ops.BatchNorm, **options: Any) -> Tensor:
    """`ops.batch_norm_act` of a map."""
    rows = maps.permute(0, 2, 3, 1)
    return ops.batch_norm_act(rows.flatten(1, 2), bn, **options).view(rows.shape).permute(0, 3, 1, 2)


def _obstacles_behind(act: nn.Module | None, bn: nn.BatchNorm2d | None) -> list[str]:
    """Why an operator would not compute what calling this activation and this batch norm computes."""
    reasons = []
    if act is not None and activation_name(act) is None:
        reasons.append(f"the activation is {act}, the fused ones are GELU (exact), QuickGELU, SiLU and ReLU")
    elif act is not None and fused.has_hooks(act):
        reasons.append("the activation has hooks")
    if bn is not None:
        reasons += fused.about("the batch norm", fused.batch_norm_obstacles(bn))
    return reasons


def _has_kernels(maps: Tensor, backend: str | None) -> bool:
    """Whether gradients are wanted where `ops.batch_norm_act` has kernels; elsewhere PyTorch's modules do as well."""
    return (
        torch.is_grad_enabled()
        and maps.ndim == 4
        and dispatch.requested_backend(backend) in ("auto", "cpu")
        and not dispatch.reasons_for_plain_operators()
        and not cpu_reasons([maps], compute_dtype(maps))
    )


def _takes(bn: nn.BatchNorm2d, maps: Tensor) -> bool:
    """Whether the operator takes what the module does: without any values, or with any momentum."""
    usual = bn.momentum is None or (isinstance(bn.momentum, float) and 0.0 <= bn.momentum <= 1.0)
    return not bn.training or (usual and maps.numel() > maps.shape[1])


def _behind(
    maps: Tensor, act: nn.Module | None, bn: nn.BatchNorm2d | None, bn_after_activation: bool, backend: str | None
) -> Tensor:
    if bn is not None and _has_kernels(maps, backend) and not _obstacles_behind(act, bn) and _takes(bn, maps):
        norm = fused.batch_norm_of(bn)
        if not norm.training:
            # Kept for the gradients; a later call in training changes the module's own.
            mean, var = bn.running_mean, bn.running_var
            assert mean is not None and var is not None
            norm = norm._replace(running_mean=mean.clone(), running_var=var.clone())
        return of_pixels(
            maps,
            norm,
            activation=None if act is None else activation_name(act),
            bn_after_activation=bn_after_activation,
            backend=backend,
        )
    steps: list[nn.Module | None] = [act, bn] if bn_after_activation else [bn, act]
    for module in steps:
        if module is None:
            continue
        if isinstance(module, nn.BatchNorm2d):
            # PyTorch's CPU batch norm in training returns a wrong input gradient when its input left that memory format
            # and the batch stride of the gradient it gets is not H*W*C (seen in 2.13).
            maps = maps.contiguous(memory_format=torch.channels_last)
        maps = module(maps)
    return maps
