"""CvT's convolutional projection: tokens in, query, key and value out."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastvit_kernels.ops import library
from fastvit_kernels.ops.arguments import (
    check_activation_tensor,
    check_grid,
    check_integer,
    check_norm,
    check_parameter,
    check_tensor,
    check_vectors,
    compute_dtype,
)
from fastvit_kernels.ops.batch_norm import BatchNorm, BatchOf, check_batch_norm, update_running_statistics
from fastvit_kernels.ops.conv_projection import native, triton
from fastvit_kernels.ops.conv_projection.reference import (
    BRANCHES,
    PER_BRANCH,
    STATIC_SCHEMA,
    Branch,
    Static,
    batch_statistics,
    branch,
    output_grid,
    reference,
)
from fastvit_kernels.ops.operator import Operator, Outputs, Tensors
from fastvit_kernels.ops.packing import PackedWeights, check_packed

__all__ = ["BatchNorm", "Projection", "conv_projection"]


class Projection(NamedTuple):
    """One branch: depthwise convolution, batch normalisation, linear.

    Attributes:
        conv_weight: depthwise filter `[C, 1, K, K]`.
        weight: linear weight `[C_out, C]`.
        bias: linear bias `[C_out]`, or None.
        bn: the batch normalisation, or None for none.
        stride, padding: of the convolution, the same for both axes; padding is with zeros.
    """

    conv_weight: Tensor
    weight: Tensor
    bias: Tensor | None
    bn: BatchNorm | None
    stride: int = 1
    padding: int = 1


def _fake(tensors: Tensors, static: Static) -> Outputs:
    x = tensors[0]
    assert x is not None
    outputs = []
    for index in range(len(BRANCHES)):
        b = branch(tensors, index)
        height, width = output_grid(static, index, b.conv_weight.shape[-1])
        shape = (x.shape[0], static.num_prefix_tokens + height * width, b.weight.shape[0])
        outputs.append(x.new_empty(shape, dtype=static.dtype))
    return tuple(outputs)


def _fake_statistics(tensors: Tensors, *static: object) -> Tensor:
    x = tensors[0]
    assert x is not None
    return x.new_empty((len(BRANCHES), 2, x.shape[-1]), dtype=torch.float32)


OPERATOR = Operator(
    name="conv_projection",
    static=Static,
    static_schema=STATIC_SCHEMA,
    parameters=tuple(range(1, 24)),
    returns=len(BRANCHES),
    reference=reference,
    fake=_fake,
    packing=lambda s: (s.norm_eps is None, *s.bn_eps),
    backends=[native.Cpu(), triton.Triton(), native.Cuda()],
)
library.register(OPERATOR, triton.launch, triton.launch_backward)
library.define_statistics("conv_projection_statistics", STATIC_SCHEMA, _fake_statistics)
library.define_triton_statistics(OPERATOR, triton.launch_statistics, _fake_statistics)


def conv_projection(
    x: Tensor,
    query: Projection,
    key: Projection,
    value: Projection,
    *,
    grid: tuple[int, int] | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    norm_eps: float | None = None,
    num_prefix_tokens: int = 0,
    packed: PackedWeights | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """LayerNorm, then for each of q, k, v: depthwise convolution, batch normalisation, linear.

    Equivalent plain PyTorch, for each branch `s` (prefix tokens skip convolution and batch normalisation)::

        u = F.layer_norm(x, (C,), norm_weight, norm_bias, norm_eps)
        prefix, tokens = u[:, :P], u[:, P:]
        maps = F.conv2d(tokens.mT.unflatten(2, grid), s.conv_weight, None, s.stride, s.padding, groups=C)
        maps = F.batch_norm(maps, ...)
        out = F.linear(torch.cat([prefix, maps.flatten(2).mT], 1), s.weight, s.bias)

    Args:
        x: `[B, P + H*W, C]` tokens, row-major over the grid behind the P prefix tokens; or, without prefix tokens, an
            NCHW map `[B, C, H, W]`, free of a copy in `torch.channels_last`. fp64, fp32, bf16 or fp16.
        query, key, value: the branches. Parameters are fp32 or of x's dtype.
        grid: `(H, W)`; taken from a 4-D `x` when omitted.
        norm_weight, norm_bias: `[C]` or None.
        norm_eps: epsilon of the LayerNorm over C (computed in fp32); None for no normalisation.
        num_prefix_tokens: class tokens in front of the map.
        packed: keeps the weights in the layout of the CPU kernels from call to call and repacks them when they change.
        backend: runs this call on one backend; see `use_backend`.

    Returns:
        q, k, v: `[B, P + H_s*W_s, C_out]`, in x's dtype or autocast's.

    Raises:
        TypeError, ValueError: naming the argument, what came and what was expected.
        BackendError: the chosen backend cannot run the call.

    Source: Wu et al., "CvT: Introducing Convolutions to Vision Transformers", section 3.2.
    """
    x, grid = _tokens(x, grid, num_prefix_tokens)
    norm_eps = check_norm(norm_weight, norm_bias, norm_eps, x)
    branches = (query, key, value)
    tensors: list[Tensor | None] = [x, norm_weight, norm_bias]
    for names, item in zip(_NAMES, branches, strict=True):
        tensors += _branch_tensors(names, item, x, grid)
    norms = [item.bn for item in branches if item.bn is not None]
    training = len(norms) > 0 and norms[0].training
    if norms and (len(norms) != len(branches) or any(bn.training != training for bn in norms)):
        raise ValueError("query.bn, key.bn, value.bn: expected all three in the same mode, or none at all")
    static = Static(
        norm_eps,
        [item.bn.eps if item.bn is not None else 0.0 for item in branches],
        training,
        grid[0],
        grid[1],
        num_prefix_tokens,
        [item.stride for item in branches],
        [item.padding for item in branches],
        compute_dtype(x),
    )
    if training:
        check_packed(packed)
        _use_batch_statistics(tensors, static, norms, backend)
    q, k, v = library.call(OPERATOR, tensors, static, packed=None if training else packed, backend=backend)
    return q, k, v


def _tokens(x: Tensor, grid: tuple[int, int] | None, num_prefix_tokens: int) -> tuple[Tensor, tuple[int, int]]:
    check_activation_tensor("x", x)
    check_integer("num_prefix_tokens", num_prefix_tokens, 0)
    if x.ndim == 4:
        if num_prefix_tokens:
            raise ValueError(
                f"num_prefix_tokens: expected 0 beside a [B, C, H, W] map, got {num_prefix_tokens}; "
                "prefix tokens come with [B, P + H*W, C] tokens and a grid"
            )
        if grid is not None and not (isinstance(grid, (tuple, list)) and tuple(grid) == tuple(x.shape[2:])):
            raise ValueError(f"grid: expected {tuple(x.shape[2:])} from x's shape, got {grid!r}")
        grid = (x.shape[2], x.shape[3])
        x = check_activation_tensor("x", x.permute(0, 2, 3, 1).flatten(1, 2))
    if x.ndim != 3:
        raise ValueError(f"x: expected [B, P + H*W, C] tokens or a [B, C, H, W] map, got shape {tuple(x.shape)}")
    return x, check_grid(grid, num_prefix_tokens, x)


def _names(name: str) -> Any:
    fields = ("conv_weight", "bn.weight", "bn.bias", "bn.running_mean", "bn.running_var", "weight", "bias")
    return name, Branch(*(f"{name}.{field}" for field in fields))  # type: ignore[arg-type]


_NAMES = tuple(_names(name) for name in ("query", "key", "value"))


def _branch_tensors(names: Any, item: Projection, x: Tensor, grid: tuple[int, int]) -> tuple[Tensor | None, ...]:
    name, names = names
    if not isinstance(item, Projection):
        raise TypeError(f"{name}: expected a Projection, got {type(item).__name__}")
    conv_weight, weight, bias, bn, stride, padding = item
    channels = x.shape[-1]
    kernel = check_tensor(names.conv_weight, conv_weight, "[C, 1, K, K]").shape[-1]
    check_parameter(names.conv_weight, conv_weight, (channels, 1, kernel, kernel), x)
    out = check_tensor(names.weight, weight, "[C_out, C]").shape[0]
    check_parameter(names.weight, weight, (out, channels), x)
    check_parameter(names.bias, bias, (out,), x, optional=True)
    if not (type(stride) is int and stride > 0 and type(padding) is int and padding >= 0):
        check_integer(f"{name}.stride", stride, 1)
        check_integer(f"{name}.padding", padding, 0)
    if min(grid) + 2 * padding < kernel:
        raise ValueError(f"{names.conv_weight}: a {kernel} x {kernel} filter is larger than the padded {grid} map")
    if bn is None:
        return conv_weight, None, None, None, None, weight, bias
    check_batch_norm(f"{name}.bn", bn)
    vectors = (bn.weight, bn.bias, bn.running_mean, bn.running_var)
    check_vectors(names[1:5], vectors, channels, x)
    return conv_weight, *vectors, weight, bias


def _use_batch_statistics(
    tensors: list[Tensor | None], static: Static, norms: list[BatchNorm], backend: str | None
) -> None:
    """Put this batch's mean and variance into `tensors` and update the running statistics as BatchNorm2d does."""
    x = tensors[0]
    assert x is not None
    counts = []
    for index in range(len(norms)):
        height, width = output_grid(static, index, branch(tensors, index).conv_weight.shape[-1])
        counts.append(x.shape[0] * height * width)
    if min(counts) < 2:
        raise ValueError(f"x: expected more than 1 value per channel when training, got {min(counts)}")
    with torch.no_grad():
        found = library.statistics_by_kernels(OPERATOR, tensors, static, backend)
        statistics = batch_statistics(tensors, static) if found is None else found.moments
        of_norms = []
        for index, (bn, count) in enumerate(zip(norms, counts, strict=True)):
            mean, var = statistics[index].unbind()
            first = 3 + PER_BRANCH * index
            tensors[first + 3], tensors[first + 4] = mean, var
            of_norms.append(BatchOf(bn, mean, var, count))
        update_running_statistics(of_norms, found is not None and found.on_cpu)
