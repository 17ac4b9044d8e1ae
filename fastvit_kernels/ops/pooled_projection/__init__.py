"""Keys and values of a pooled map: average pooling, GroupNorm and linear."""

from __future__ import annotations

from torch import Tensor

from fastvit_kernels.ops import library
from fastvit_kernels.ops.arguments import (
    check_activation_tensor,
    check_eps,
    check_flag,
    check_integer,
    check_map,
    check_parameter,
    check_statistics,
    check_tensor,
    check_vectors,
    compute_dtype,
)
from fastvit_kernels.ops.operator import Operator, Outputs, Tensors
from fastvit_kernels.ops.packing import PackedWeights
from fastvit_kernels.ops.pooled_projection import native, triton
from fastvit_kernels.ops.pooled_projection.reference import STATIC_SCHEMA, Static, reference
from fastvit_kernels.ops.pooling import pooled_side

__all__ = ["pooled_projection"]


def _fake(tensors: Tensors, static: Static) -> Outputs:
    x, weight = tensors[0], tensors[6]
    assert x is not None and weight is not None
    height, width = (pooled_side(s, static.kernel_size, static.ceil_mode) for s in (static.height, static.width))
    return (x.new_empty((x.shape[0], height * width, weight.shape[0]), dtype=static.dtype),)


OPERATOR = Operator(
    name="pooled_projection",
    static=Static,
    static_schema=STATIC_SCHEMA,
    parameters=(1, 2, 4, 5, 6, 7),
    returns=1,
    reference=reference,
    fake=_fake,
    packing=lambda s: (s.in_norm_eps is None, s.norm_eps is None),
    backends=[native.Cpu(), triton.Triton()],
)
library.register(OPERATOR, triton.launch, triton.launch_backward)


def pooled_projection(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    grid: tuple[int, int],
    kernel_size: int,
    ceil_mode: bool = False,
    in_norm_weight: Tensor | None = None,
    in_norm_bias: Tensor | None = None,
    in_norm_eps: float | None = None,
    in_norm_statistics: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    norm_eps: float | None = None,
    packed: PackedWeights | None = None,
    backend: str | None = None,
) -> Tensor:
    """GroupNorm, average pooling by squares, GroupNorm and a linear.

    Equivalent plain PyTorch, both norms of one group over all pixels and channels of a sample::

        maps = F.group_norm(x.mT.unflatten(2, grid), 1, in_norm_weight, in_norm_bias, in_norm_eps)
        maps = F.avg_pool2d(maps, kernel_size, ceil_mode=ceil_mode)
        maps = F.group_norm(maps, 1, norm_weight, norm_bias, norm_eps)
        out = F.linear(maps.flatten(2).mT, weight, bias)

    Args:
        x: `[B, H*W, C]` tokens of a map, row-major; fp64, fp32, bf16 or fp16.
        weight: `[C_out, C]`; fp32 or x's dtype, like all parameters.
        bias: `[C_out]` or None.
        grid: `(H, W)`.
        kernel_size: side and stride of the squares, in pixels.
        ceil_mode: squares at the right and at the bottom may hold fewer pixels; False leaves the rest out.
        in_norm_weight, in_norm_bias: `[C]` or None.
        in_norm_eps: epsilon of the norm in front of the pooling; None for no norm.
        in_norm_statistics: mean and biased variance of each sample of x, `[B, 2]`, as a previous operator returned
            them; None to compute them here.
        norm_weight, norm_bias: `[C]` or None.
        norm_eps: epsilon of the norm of the pooled map; None for no norm. Both norms are computed in at least fp32.
        packed: keeps the weights in the layout of the CPU kernels from call to call and repacks them when they change.
        backend: runs this call on one backend; see `use_backend`.

    Returns:
        `[B, H' * W', C_out]`, one row per square, in x's dtype or autocast's.

    Raises:
        TypeError, ValueError: naming the argument, what came and what was expected.
        BackendError: the chosen backend cannot run the call.

    Source: Liu et al., "Vision Transformers with Hierarchical Attention", section 3.2 (the keys and values of the
    global half).
    """
    channels = check_activation_tensor("x", x, 3).shape[2]
    height, width = check_map(grid, x)
    check_integer("kernel_size", kernel_size, 1)
    check_flag("ceil_mode", ceil_mode)
    if not ceil_mode and min(height, width) < kernel_size:
        raise ValueError(f"grid: expected sides of at least kernel_size = {kernel_size}, got {height} x {width}")
    out = check_tensor("weight", weight, "[C_out, C]").shape[0]
    check_parameter("weight", weight, (out, channels), x)
    check_parameter("bias", bias, (out,), x, optional=True)
    in_norm_eps = _check_norm("in_norm", in_norm_weight, in_norm_bias, in_norm_eps, in_norm_statistics, x)
    norm_eps = _check_norm("norm", norm_weight, norm_bias, norm_eps, None, x)
    tensors = [x, in_norm_weight, in_norm_bias, in_norm_statistics, norm_weight, norm_bias, weight, bias]
    static = Static(in_norm_eps, norm_eps, height, width, kernel_size, ceil_mode, compute_dtype(x))
    return library.call(OPERATOR, tensors, static, packed=packed, backend=backend)[0]


def _check_norm(
    name: str, weight: Tensor | None, bias: Tensor | None, eps: float | None, statistics: Tensor | None, x: Tensor
) -> float | None:
    if eps is None:
        for part, value in (("weight", weight), ("bias", bias), ("statistics", statistics)):
            if value is not None:
                raise ValueError(f"{name}_eps: expected the norm's epsilon beside {name}_{part}, got None")
        return None
    check_vectors((f"{name}_weight", f"{name}_bias"), (weight, bias), x.shape[2], x)
    if statistics is not None:
        check_statistics(f"{name}_statistics", statistics, x)
    return check_eps(f"{name}_eps", eps)
