"""A depthwise convolution of tokens: CMT's local perception and its reduction of keys, Twins' positional encoding."""

from __future__ import annotations

import torch
from torch import Tensor

from fastvit_kernels.ops import library
from fastvit_kernels.ops.arguments import (
    check_activation_tensor,
    check_grid,
    check_integer,
    check_norm,
    check_parameter,
    check_residual,
    check_tensor,
    check_vectors,
    compute_dtype,
)
from fastvit_kernels.ops.batch_norm import (
    BatchNorm,
    batch_norm_tensors,
    check_batch_norm,
)
from fastvit_kernels.ops.depthwise_conv import native, triton
from fastvit_kernels.ops.depthwise_conv.reference import (
    STATIC_SCHEMA,
    Static,
    batch_statistics,
    output_grid,
    reference,
)
from fastvit_kernels.ops.operator import Operator, Outputs, Tensors
from fastvit_kernels.ops.packing import PackedWeights, check_packed

__all__ = ["depthwise_conv"]


def _fake(tensors: Tensors, static: Static) -> Outputs:
    x, weight, residual = tensors[0], tensors[1], tensors[9]
    assert x is not None and weight is not None
    height, width = output_grid(static, weight.shape[-1])
    dtype = static.dtype if residual is None else torch.promote_types(residual.dtype, static.dtype)
    return (x.new_empty((x.shape[0], height * width, x.shape[2]), dtype=dtype),)


def _fake_statistics(tensors: Tensors, *static: object) -> Tensor:
    x = tensors[0]
    assert x is not None
    return x.new_empty((2, x.shape[2]), dtype=torch.float32)


OPERATOR = Operator(
    name="depthwise_conv",
    static=Static,
    static_schema=STATIC_SCHEMA,
    parameters=tuple(range(1, 9)),
    returns=1,
    reference=reference,
    fake=_fake,
    packing=lambda s: (s.norm_eps is None, s.bn_eps),
    residual=9,
    backends=[native.Cpu(), triton.Triton()],
)
library.register(OPERATOR, triton.launch, triton.launch_backward)
library.define_statistics("depthwise_conv_statistics", STATIC_SCHEMA, _fake_statistics)
library.define_triton_statistics(OPERATOR, triton.launch_statistics, _fake_statistics)


def depthwise_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    grid: tuple[int, int],
    stride: int = 1,
    padding: int = 0,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    norm_eps: float | None = None,
    bn: BatchNorm | None = None,
    residual: Tensor | None = None,
    packed: PackedWeights | None = None,
    backend: str | None = None,
) -> Tensor:
    """LayerNorm over the channels, a depthwise convolution of the map, batch normalisation, residual.

    Equivalent plain PyTorch, all but the convolution optional::

        maps = F.layer_norm(x, (C,), norm_weight, norm_bias, norm_eps).mT.unflatten(2, grid)
        maps = F.batch_norm(F.conv2d(maps, weight, bias, stride, padding, groups=C), ...)
        out = residual + maps.flatten(2).mT

    Args:
        x: `[B, H*W, C]` tokens, row-major over the grid; fp64, fp32, bf16 or fp16.
        weight: depthwise filter `[C, 1, K, K]`; fp32 or x's dtype, like all parameters.
        bias: `[C]` or None.
        grid: `(H, W)`.
        stride, padding: of the convolution, the same for both axes; padding is with zeros, behind the LayerNorm.
        norm_weight, norm_bias: `[C]` or None.
        norm_eps: epsilon of the LayerNorm (computed in fp32) in front; None for no normalisation.
        bn: the batch normalisation behind the convolution, or None. In training it normalises by the batch's
            statistics and updates the running ones as `nn.BatchNorm2d` does.
        residual: added to the result, `[B, H'*W', C]` (where the map keeps its size usually `x` itself), or None.
        packed: keeps the weights in the layout of the CPU kernels from call to call and repacks them when they change.
        backend: runs this call on one backend; see `use_backend`.

    Returns:
        `[B, H'*W', C]`, in x's dtype or autocast's, promoted with the residual's.

    Raises:
        TypeError, ValueError: naming the argument, what came and what was expected.
        BackendError: the chosen backend cannot run the call.

    Source: Guo et al., "CMT: Convolutional Neural Networks Meet Vision Transformers", sections 3.2 and 3.3; Chu et al.,
    "Conditional Positional Encodings for Vision Transformers", section 4.
    """
    batch, _, channels = check_activation_tensor("x", x, 3).shape
    height, width = check_grid(grid, 0, x)
    kernel = check_tensor("weight", weight, "[C, 1, K, K]").shape[-1]
    check_parameter("weight", weight, (channels, 1, kernel, kernel), x)
    check_parameter("bias", bias, (channels,), x, optional=True)
    norm_eps = check_norm(norm_weight, norm_bias, norm_eps, x)
    check_integer("stride", stride, 1)
    check_integer("padding", padding, 0)
    if min(height, width) + 2 * padding < kernel:
        raise ValueError(f"weight: a {kernel} x {kernel} filter is larger than the padded {height} x {width} map")
    if bn is not None:
        check_batch_norm("bn", bn)
        check_vectors(("bn.weight", "bn.bias", "bn.running_mean", "bn.running_var"), bn[:4], channels, x)
    eps, training = (0.0, False) if bn is None else (bn.eps, bn.training)
    static = Static(norm_eps, eps, training, height, width, stride, padding, compute_dtype(x))
    out_height, out_width = output_grid(static, kernel)
    if residual is not None:
        check_residual(residual, (batch, out_height * out_width, channels), x)
    tensors = [x, weight, bias, norm_weight, norm_bias, *batch_norm_tensors(bn, channels, x), residual]
    if bn is not None and training:
        check_packed(packed)
        count, by_kernels = batch * out_height * out_width, padding <= native.MOST_PADDING
        library.take_batch_statistics(OPERATOR, tensors, 7, static, bn, count, backend, batch_statistics, by_kernels)
    return library.call(OPERATOR, tensors, static, packed=None if training else packed, backend=backend)[0]
