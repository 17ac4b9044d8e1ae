"""A dense strided convolution with norms and an activation: of a stem, in front of a stage or of reduced keys."""

from __future__ import annotations

import torch
from torch import Tensor

from fastvit_kernels.ops import library
from fastvit_kernels.ops.activations import ALL_ACTIVATIONS
from fastvit_kernels.ops.arguments import (
    check_activation_tensor,
    check_eps,
    check_flag,
    check_integer,
    check_norm,
    check_parameter,
    check_tensor,
    check_vectors,
    compute_dtype,
)
from fastvit_kernels.ops.batch_norm import (
    BatchNorm,
    batch_norm_tensors,
    check_batch_norm,
)
from fastvit_kernels.ops.operator import Operator, Outputs, Tensors
from fastvit_kernels.ops.packing import PackedWeights, check_packed
from fastvit_kernels.ops.patch_embedding import native, triton
from fastvit_kernels.ops.patch_embedding.reference import (
    STATIC_SCHEMA,
    Static,
    batch_statistics,
    output_size,
    reference,
)

__all__ = ["patch_embedding"]


def _fake(tensors: Tensors, static: Static) -> Outputs:
    x, weight = tensors[0], tensors[1]
    assert x is not None and weight is not None
    height, width = (output_size(size, weight.shape[-1], static) for size in x.shape[1:3])
    return (x.new_empty((x.shape[0], height, width, weight.shape[0]), dtype=static.out_dtype),)


def _fake_statistics(tensors: Tensors, *static: object) -> Tensor:
    x, weight = tensors[:2]
    assert x is not None and weight is not None
    return x.new_empty((2, weight.shape[0]), dtype=torch.float32)


OPERATOR = Operator(
    name="patch_embedding",
    static=Static,
    static_schema=STATIC_SCHEMA,
    parameters=tuple(range(1, 11)),
    returns=1,
    reference=reference,
    fake=_fake,
    packing=lambda s: (s.norm_eps is None, s.in_norm_eps is None, s.bn_after_activation, s.bn_eps),
    triton_any_layout=(0,),
    backends=[native.Cpu(), triton.Triton()],
)
library.register(OPERATOR, triton.launch, triton.launch_backward)
library.define_triton_statistics(OPERATOR, triton.launch_statistics, _fake_statistics)


def patch_embedding(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    stride: int,
    padding: int = 0,
    activation: str | None = None,
    bn: BatchNorm | None = None,
    bn_after_activation: bool = False,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    norm_eps: float | None = None,
    in_norm_weight: Tensor | None = None,
    in_norm_bias: Tensor | None = None,
    in_norm_eps: float | None = None,
    in_scale: Tensor | None = None,
    in_shift: Tensor | None = None,
    out_scale: Tensor | None = None,
    out_shift: Tensor | None = None,
    packed: PackedWeights | None = None,
    backend: str | None = None,
) -> Tensor:
    """LayerNorm over the channels, a dense strided convolution, batch norm and activation, LayerNorm over the channels.

    Equivalent plain PyTorch, all but the convolution optional::

        x = F.layer_norm(x.permute(0, 2, 3, 1), (C,), in_norm_weight, in_norm_bias, in_norm_eps).permute(0, 3, 1, 2)
        maps = F.conv2d(x, weight, bias, stride, padding)
        maps = bn(activation(maps)) if bn_after_activation else activation(bn(maps))
        out = F.layer_norm(maps.permute(0, 2, 3, 1), (C_out,), norm_weight, norm_bias, norm_eps).permute(0, 3, 1, 2)

    In the place of either LayerNorm may be a scale and a shift alone: `x * in_scale.view(-1, 1, 1) +
    in_shift.view(-1, 1, 1)`, and the same of the result.

    Args:
        x: `[B, C, H, W]`, on a CPU free of a copy in `torch.channels_last`; fp64, fp32, bf16 or fp16.
        weight: `[C_out, C, K, K]`; fp32 or x's dtype, like all parameters.
        bias: `[C_out]` or None.
        stride, padding: of the convolution, the same for both axes; padding is with zeros.
        activation: `"gelu"` (exact, erf), `"quick_gelu"`, `"silu"`, `"relu"` or None.
        bn: a batch normalisation of the convolution's result, or None. In training it normalises by the batch's
            statistics and updates the running ones as `nn.BatchNorm2d` does.
        bn_after_activation: it stands behind the activation, not in front of it.
        norm_weight, norm_bias: `[C_out]` or None.
        norm_eps: epsilon of the LayerNorm (computed in fp32) behind the convolution; None for no normalisation.
        in_norm_weight, in_norm_bias: `[C]` or None.
        in_norm_eps: epsilon of the LayerNorm in front, which leaves the zero padding alone; None for no normalisation.
        in_scale, in_shift: `[C]` or None: of the pixels of x, computed in at least fp32; they leave the zero padding
            alone. Not beside `in_norm_eps`.
        out_scale, out_shift: `[C_out]` or None: of the result. Not beside `norm_eps`.
        packed: keeps the weights in the layout of the CPU kernels from call to call and repacks them when they change.
        backend: runs this call on one backend; see `use_backend`.

    Returns:
        `[B, C_out, H', W']` in channels-last memory, in x's dtype. Under autocast: fp32 behind a norm or a scale and
        shift, else autocast's dtype, as autocast treats these steps.

    Raises:
        TypeError, ValueError: naming the argument, what came and what was expected.
        BackendError: the chosen backend cannot run the call.

    Source: Wu et al., "CvT: Introducing Convolutions to Vision Transformers", section 3.1; with both norms the keys and
    values of Wang et al., "Pyramid Vision Transformer", section 3.3; with scales and shifts the stem of Lu et al.,
    "Bridging the Gap Between Vision Transformers and Convolutional Neural Networks on Small Datasets", section 3.2.
    """
    channels = check_activation_tensor("x", x, 4).shape[1]
    out, _, _, kernel = check_tensor("weight", weight, "[C_out, C, K, K]").shape
    check_parameter("weight", weight, (out, channels, kernel, kernel), x)
    check_parameter("bias", bias, (out,), x, optional=True)
    if norm_eps is not None:
        check_eps("norm_eps", norm_eps)
    elif norm_weight is not None or norm_bias is not None:
        raise ValueError("norm_eps: expected the LayerNorm's epsilon beside norm_weight or norm_bias, got None")
    check_parameter("norm_weight", norm_weight, (out,), x, optional=True)
    check_parameter("norm_bias", norm_bias, (out,), x, optional=True)
    if in_norm_eps is not None:
        check_eps("in_norm_eps", in_norm_eps)
    elif in_norm_weight is not None or in_norm_bias is not None:
        raise ValueError("in_norm_eps: expected the epsilon beside in_norm_weight or in_norm_bias, got None")
    check_parameter("in_norm_weight", in_norm_weight, (channels,), x, optional=True)
    check_parameter("in_norm_bias", in_norm_bias, (channels,), x, optional=True)
    check_vectors(("in_scale", "in_shift"), (in_scale, in_shift), channels, x)
    check_vectors(("out_scale", "out_shift"), (out_scale, out_shift), out, x)
    scales = out_scale is not None or out_shift is not None
    if in_norm_eps is not None and (in_scale is not None or in_shift is not None):
        raise ValueError("in_scale, in_shift: expected None beside in_norm_eps, got a tensor")
    if norm_eps is not None and scales:
        raise ValueError("out_scale, out_shift: expected None beside norm_eps, got a tensor")
    check_integer("stride", stride, 1)
    check_integer("padding", padding, 0)
    if min(x.shape[2:]) + 2 * padding < kernel:
        raise ValueError(f"x: a {kernel} x {kernel} filter is larger than the padded {tuple(x.shape[2:])} map")
    if activation is not None and activation not in ALL_ACTIVATIONS:
        raise ValueError(f"activation: expected one of {', '.join(ALL_ACTIVATIONS)} or None, got {activation!r}")
    check_flag("bn_after_activation", bn_after_activation)
    if bn is not None:
        check_batch_norm("bn", bn)
        check_vectors(("bn.weight", "bn.bias", "bn.running_mean", "bn.running_var"), bn[:4], out, x)
    bn_eps, training = (0.0, False) if bn is None else (bn.eps, bn.training)
    dtype = compute_dtype(x)
    out_dtype = dtype
    if (norm_eps is not None or scales) and dtype is not x.dtype:
        out_dtype = torch.promote_types(dtype, torch.float32)
    static = Static(
        norm_eps,
        in_norm_eps,
        stride,
        padding,
        activation or "none",
        bn_after_activation,
        bn_eps,
        training,
        dtype,
        out_dtype,
    )
    rows = x.permute(0, 2, 3, 1)
    tensors = [rows, weight, bias]
    tensors += [out_scale, out_shift] if norm_eps is None else [norm_weight, norm_bias]
    tensors += [in_scale, in_shift] if in_norm_eps is None else [in_norm_weight, in_norm_bias]
    tensors += batch_norm_tensors(bn, out, x)
    if bn is not None and training:
        check_packed(packed)
        height, width = (output_size(size, kernel, static) for size in x.shape[2:])
        count = x.shape[0] * height * width
        library.take_batch_statistics(OPERATOR, tensors, 9, static, bn, count, backend, batch_statistics)
    packed = None if training else packed
    return library.call(OPERATOR, tensors, static, packed=packed, backend=backend)[0].permute(0, 3, 1, 2)


def linear_of_rows(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    norm_eps: float | None = None,
    packed: PackedWeights | None = None,
    backend: str | None = None,
) -> Tensor:
    """LayerNorm and linear, fused: `patch_embedding` of one row of pixels with a 1 x 1 filter.

    Equivalent plain PyTorch, the norm optional::

        F.linear(F.layer_norm(x, (C,), norm_weight, norm_bias, norm_eps), weight, bias)

    Args:
        x: `[B, N, C]`, N at least 1.
        weight: `[C_out, C]`.
        bias: `[C_out]` or None.
        norm_weight, norm_bias, norm_eps: of the LayerNorm, None for none.
        packed, backend: as `patch_embedding` takes them.

    Returns:
        `[B, N, C_out]`, in x's dtype or autocast's.

    Raises:
        TypeError, ValueError: naming the argument, what came and what was expected.
        BackendError: the chosen backend cannot run the call.
    """
    _, rows, channels = check_activation_tensor("x", x, 3).shape
    if rows < 1:
        raise ValueError(f"x: expected [B, N, C] with at least one row, got shape {tuple(x.shape)}")
    out = check_tensor("weight", weight, "[C_out, C]").shape[0]
    check_parameter("weight", weight, (out, channels), x)
    check_parameter("bias", bias, (out,), x, optional=True)
    norm_eps = check_norm(norm_weight, norm_bias, norm_eps, x)
    dtype = compute_dtype(x)
    static = Static(None, norm_eps, 1, 0, "none", False, 0.0, False, dtype, dtype)
    nothing = (None,) * 2
    tensors = [x.unsqueeze(1), weight[:, :, None, None], bias, *nothing, norm_weight, norm_bias, *nothing, *nothing]
    return library.call(OPERATOR, tensors, static, packed=packed, backend=backend)[0].squeeze(1)
