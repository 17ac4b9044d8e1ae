"""The MLP with a depthwise convolution in its middle: PVTv2's, SegFormer's, CMT's, DHVT's, HAT-Net's, MBConv."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastvit_kernels.ops import library
from fastvit_kernels.ops.activations import ALL_ACTIVATIONS
from fastvit_kernels.ops.arguments import (
    check_activation_tensor,
    check_eps,
    check_flag,
    check_grid,
    check_norm_kind,
    check_parameter,
    check_residual,
    check_tensor,
    check_vectors,
    compute_dtype,
)
from fastvit_kernels.ops.batch_norm import (
    BatchNorm,
    BatchOf,
    batch_norm_tensors,
    check_batch_norm,
    update_running_statistics,
)
from fastvit_kernels.ops.depthwise_mlp import native, triton
from fastvit_kernels.ops.depthwise_mlp.reference import (
    BATCH_NORMS,
    INNER_RESIDUALS,
    STATIC_SCHEMA,
    Static,
    batch_statistics,
    reference,
)
from fastvit_kernels.ops.operator import Operator, Outputs, Tensors
from fastvit_kernels.ops.packing import PackedWeights, check_packed
from fastvit_kernels.ops.precision import wide

__all__ = ["depthwise_mlp"]


def _fake(tensors: Tensors, static: Static) -> Outputs:
    x, fc2_weight, residual = tensors[0], tensors[16], tensors[24]
    assert x is not None and fc2_weight is not None
    dtype = static.dtype if residual is None else torch.promote_types(residual.dtype, static.dtype)
    width = fc2_weight.shape[0]
    summary = {"none": (0,), "mean": (x.shape[0], width), "statistics": (x.shape[0], 2)}[static.summary]
    return x.new_empty((*x.shape[:2], width), dtype=dtype), x.new_empty(summary, dtype=wide(static.dtype))


def _fake_statistics(tensors: Tensors, *static: object) -> Tensor:
    x, fc1_weight, fc2_weight = tensors[0], tensors[4], tensors[16]
    assert x is not None and fc1_weight is not None and fc2_weight is not None
    return x.new_empty((2, 2 * fc1_weight.shape[0] + fc2_weight.shape[0]), dtype=torch.float32)


# Hidden channels of a kept map come in multiples of this, which every instruction set's vectors divide.
_KEPT_PANEL = 16


def _fake_two_steps(tensors: Tensors, *arguments: Any) -> Outputs:
    """Statistics; the hidden map in front of its norm, in a layout of the kernels' own; the branch in front of bn3."""
    static, keep = Static(*arguments[:-1]), arguments[-1]
    x, fc1_weight, fc2_weight, last_mean = tensors[0], tensors[4], tensors[16], tensors[20]
    assert x is not None and fc1_weight is not None and fc2_weight is not None
    batch, pixels, hidden = x.shape[0], static.height * static.width, fc1_weight.shape[0]
    goes_on = last_mean is not None and static.out_norm_eps is None and static.summary != "statistics"
    kept = (batch, -(-hidden // _KEPT_PANEL) * _KEPT_PANEL, pixels) if goes_on and keep else (0,)
    branch = (batch, pixels, fc2_weight.shape[0]) if goes_on else (0,)
    return (
        _fake_statistics(tensors),
        x.new_empty(kept, dtype=static.dtype if goes_on and keep else torch.float32),
        x.new_empty(branch, dtype=torch.float32),
    )


def _fake_keeping(tensors: Tensors, *arguments: Any) -> Outputs:
    """The results, and the branch in front of its own norm."""
    static, x, fc2_weight = Static(*arguments), tensors[0], tensors[16]
    assert x is not None and fc2_weight is not None
    branch = (0,) if static.out_norm_eps is None else (x.shape[0], static.height * static.width, fc2_weight.shape[0])
    return (*_fake(tensors, static), x.new_empty(branch, dtype=torch.float32))


OPERATOR = Operator(
    name="depthwise_mlp",
    static=Static,
    static_schema=STATIC_SCHEMA,
    parameters=(1, 2, *range(4, 24)),
    returns=2,
    reference=reference,
    fake=_fake,
    packing=lambda s: (s.norm, s.bn_after_activation, s.inner_residual, *s.bn_eps, s.out_norm_eps is None),
    residual=24,
    residual_in_all=lambda s: s.summary == "statistics",
    backends=[native.Cpu(), triton.Triton(), native.Cuda()],
)
library.register(OPERATOR, triton.launch, triton.launch_backward)
library.define_two_steps(OPERATOR, _fake_two_steps)
library.define_keeping(OPERATOR, _fake_keeping)
library.define_triton_statistics(OPERATOR, triton.launch_statistics, _fake_statistics)


def depthwise_mlp(
    x: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    dw_weight: Tensor,
    dw_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    *,
    grid: tuple[int, int],
    activation: str,
    hidden_activation: str | None = None,
    inner_residual: str | None = None,
    norm: str | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    norm_eps: float | None = None,
    norm_statistics: Tensor | None = None,
    bn1: BatchNorm | None = None,
    bn2: BatchNorm | None = None,
    bn3: BatchNorm | None = None,
    bn_after_activation: bool = False,
    out_norm_weight: Tensor | None = None,
    out_norm_bias: Tensor | None = None,
    out_norm_eps: float | None = None,
    residual: Tensor | None = None,
    num_prefix_tokens: int = 0,
    return_statistics: bool = False,
    return_mean: bool = False,
    packed: PackedWeights | None = None,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Norm, linear, activation, depthwise convolution, activation, linear and residual, fused.

    Equivalent plain PyTorch, for PVTv2's (`activation="gelu"`, `norm="layer"`)::

        h = F.linear(F.layer_norm(x, (C,), norm_weight, norm_bias, norm_eps), fc1_weight, fc1_bias)
        h = F.conv2d(h.mT.unflatten(2, grid), dw_weight, dw_bias, padding=K // 2, groups=C_hidden)
        out = residual + F.linear(F.gelu(h).flatten(2).mT, fc2_weight, fc2_bias)

    and in general, every step but the linears and the convolution optional::

        h = fc1(norm(x))
        h = bn1(hidden_activation(h)) if bn_after_activation else hidden_activation(bn1(h))
        y = dw(h) + h                                  # inner_residual="before_activation"
        y = bn2(activation(y)) if bn_after_activation else activation(bn2(y))
        y = y + h                                      # inner_residual="after_activation"
        out = residual + out_norm(bn3(fc2(y)))

    Args:
        x: `[B, P + H*W, C]` tokens, row-major over the grid behind P prefix tokens; fp64, fp32, bf16 or fp16.
        fc1_weight: `[C_hidden, C]`; fp32 or x's dtype, like all parameters.
        fc1_bias: `[C_hidden]` or None.
        dw_weight: depthwise filter `[C_hidden, 1, K, K]`, K odd; stride 1, zero padding `K // 2`.
        dw_bias: `[C_hidden]` or None.
        fc2_weight: `[C_out, C_hidden]`.
        fc2_bias: `[C_out]` or None.
        grid: `(H, W)`.
        activation: behind the convolution: `"gelu"` (exact, erf), `"quick_gelu"`, `"silu"` or `"relu"`.
        hidden_activation: behind the first linear: the same, or None.
        inner_residual: adds the convolution's input to its result `"before_activation"` (CMT) or `"after_activation"`
            (DHVT); None for neither.
        norm: of x: `"layer"` (LayerNorm), `"group"` (GroupNorm with one group over all pixels and channels of a sample)
            or None. Computed in at least fp32.
        norm_weight, norm_bias: `[C]` or None.
        norm_eps: the norm's epsilon.
        norm_statistics: for `"group"`, the mean and biased variance of each sample `[B, 2]`, as a previous operator
            returned them; None to compute them here.
        bn1, bn2, bn3: batch normalisations of the hidden map, of the convolution's result, of the second linear's
            result; None for none. All in the same mode. In training they normalise by the batch's statistics and update
            the running ones as `nn.BatchNorm2d` does.
        bn_after_activation: `bn1` and `bn2` stand behind their activations, not in front of them.
        out_norm_weight, out_norm_bias: `[C_out]` or None.
        out_norm_eps: epsilon of a GroupNorm with one group behind the second linear; None for none.
        residual: added to the result, `[B, P + H*W, C_out]` (usually `x` itself), or None.
        num_prefix_tokens: P, the class tokens in front. They skip all of this: their rows of the result are the
            residual's, or zeros.
        return_statistics: also return mean and biased variance of each sample of the result, without prefix rows.
        return_mean: also return the mean over the pixels of the branch, in front of the residual.
        packed: keeps the weights in the layout of the CPU kernels from call to call and repacks them when they change.
        backend: runs this call on one backend; see `use_backend`.

    Returns:
        `[B, P + H*W, C_out]`, in x's dtype or autocast's, promoted with the residual's; with `return_statistics` also
        `[B, 2]`, with `return_mean` also `[B, C_out]`, in at least fp32.

    Raises:
        TypeError, ValueError: naming the argument, what came and what was expected.
        BackendError: the chosen backend cannot run the call.

    Source: Wang et al., "PVT v2", section 3.3; Xie et al., "SegFormer", section 3.1; Guo et al., "CMT", section 3.4; Lu
    et al., "Bridging the Gap Between Vision Transformers and CNNs on Small Datasets" (DHVT), section 3.3; Liu et al.,
    "Vision Transformers with Hierarchical Attention", section 3.3.
    """
    channels = check_activation_tensor("x", x, 3).shape[2]
    height, width = check_grid(grid, num_prefix_tokens, x)
    hidden = check_tensor("fc1_weight", fc1_weight, "[C_hidden, C]").shape[0]
    check_parameter("fc1_weight", fc1_weight, (hidden, channels), x)
    kernel = check_tensor("dw_weight", dw_weight, "[C_hidden, 1, K, K]").shape[-1]
    check_parameter("dw_weight", dw_weight, (hidden, 1, kernel, kernel), x)
    if kernel % 2 == 0:
        raise ValueError(f"dw_weight: expected an odd kernel, got {kernel} x {kernel}")
    out = check_tensor("fc2_weight", fc2_weight, "[C_out, C_hidden]").shape[0]
    check_parameter("fc2_weight", fc2_weight, (out, hidden), x)
    check_vectors(("fc1_bias", "dw_bias"), (fc1_bias, dw_bias), hidden, x)
    check_parameter("fc2_bias", fc2_bias, (out,), x, optional=True)
    for name, value in (("activation", activation), ("hidden_activation", hidden_activation)):
        if value not in ALL_ACTIVATIONS and not (name == "hidden_activation" and value is None):
            raise ValueError(f"{name}: expected one of {', '.join(ALL_ACTIVATIONS)}, got {value!r}")
    inner = "none" if inner_residual is None else inner_residual
    if inner not in INNER_RESIDUALS:
        raise ValueError(f"inner_residual: expected one of {', '.join(INNER_RESIDUALS[1:])}, got {inner_residual!r}")
    kind, norm_eps = check_norm_kind(norm, norm_weight, norm_bias, norm_eps, norm_statistics, x)
    norms = _check_batch_norms((bn1, bn2, bn3), (hidden, hidden, out), x)
    if out_norm_eps is not None:
        out_norm_eps = check_eps("out_norm_eps", out_norm_eps)
    elif out_norm_weight is not None or out_norm_bias is not None:
        raise ValueError("out_norm_eps: expected the epsilon beside out_norm_weight or out_norm_bias, got None")
    check_vectors(("out_norm_weight", "out_norm_bias"), (out_norm_weight, out_norm_bias), out, x)
    if residual is not None:
        check_residual(residual, (*x.shape[:2], out), x)
    check_flag("bn_after_activation", bn_after_activation)
    check_flag("return_statistics", return_statistics)
    check_flag("return_mean", return_mean)
    if return_statistics and return_mean:
        raise ValueError("return_mean: expected False beside return_statistics, got True")
    training = any(bn is not None and bn.training for bn in norms)
    tensors = [
        *(x, norm_weight, norm_bias, norm_statistics, fc1_weight, fc1_bias, *batch_norm_tensors(bn1, hidden, x)),
        *(
            dw_weight,
            dw_bias,
            *batch_norm_tensors(bn2, hidden, x),
            fc2_weight,
            fc2_bias,
            *batch_norm_tensors(bn3, out, x),
        ),
        *(out_norm_weight, out_norm_bias, residual),
    ]
    static = Static(
        kind,
        norm_eps,
        hidden_activation or "none",
        activation,
        inner,
        bn_after_activation,
        [0.0 if bn is None else bn.eps for bn in norms],
        training,
        out_norm_eps,
        height,
        width,
        num_prefix_tokens,
        "statistics" if return_statistics else "mean" if return_mean else "none",
        compute_dtype(x),
    )
    if training:
        check_packed(packed)
    begun = _use_batch_statistics(tensors, static, norms, backend) if training else ()
    packed = None if training else packed
    found, summary = library.call(OPERATOR, tensors, static, packed=packed, backend=backend, begun=begun)
    return found if static.summary == "none" else (found, summary)


def _check_batch_norms(
    norms: tuple[BatchNorm | None, ...], widths: tuple[int, ...], x: Tensor
) -> tuple[BatchNorm | None, ...]:
    for index, (bn, width) in enumerate(zip(norms, widths, strict=True), 1):
        if bn is None:
            continue
        name = f"bn{index}"
        check_batch_norm(name, bn)
        fields = ("weight", "bias", "running_mean", "running_var")
        check_vectors([f"{name}.{field}" for field in fields], bn[:4], width, x)
    if len({bn.training for bn in norms if bn is not None}) > 1:
        raise ValueError("bn1, bn2, bn3: expected all of them in the same mode")
    return norms


def _use_batch_statistics(
    tensors: list[Tensor | None], static: Static, norms: tuple[BatchNorm | None, ...], backend: str | None
) -> Outputs:
    """Put this batch's means and variances into `tensors`, update the running statistics as BatchNorm2d does.

    Returns:
        What the kernels for them found on the way, which the call goes on from.
    """
    x = tensors[0]
    assert x is not None
    count = x.shape[0] * static.height * static.width
    if count < 2:
        raise ValueError(f"x: expected more than 1 value per channel when training, got {count}")
    gradients = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    with torch.no_grad():
        kernels = library.statistics_by_kernels(OPERATOR, tensors, static, backend, gradients)
        statistics = batch_statistics(tensors, static) if kernels is None else _by_norm(kernels.moments, tensors)
        of_norms = []
        for bn, first, found in zip(norms, BATCH_NORMS, statistics, strict=True):
            if bn is not None and found is not None:
                tensors[first + 2], tensors[first + 3] = found
                of_norms.append(BatchOf(bn, *found, count))
        update_running_statistics(of_norms, kernels is not None and kernels.on_cpu)
    return () if kernels is None else kernels.begun


def _by_norm(moments: Tensor, tensors: Tensors) -> list[tuple[Tensor, Tensor]]:
    """What kernels compute as one tensor, apart."""
    fc1_weight, fc2_weight = tensors[4], tensors[16]
    assert fc1_weight is not None and fc2_weight is not None
    hidden, out = fc1_weight.shape[0], fc2_weight.shape[0]
    found = torch.split_with_sizes(moments.view(-1), [hidden, hidden, out] * 2)
    return list(zip(found[:3], found[3:], strict=True))
