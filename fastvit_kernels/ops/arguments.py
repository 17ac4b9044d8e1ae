"""Argument checks shared by the operators: every message names the argument, what came and what was expected.

They run on every call, before kernels of a few tens of microseconds: a good argument is recognised in one expression,
and only a bad one pays for finding out what is wrong.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

FLOATING = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def check_tensor(name: str, value: object, layout: str | None = None) -> Tensor:
    """A tensor; with `layout`, as in `"[C_out, C]"`, of that many dimensions, none of them empty."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(value).__name__}")
    if layout is not None and (value.ndim != layout.count(",") + 1 or 0 in value.shape):
        raise ValueError(f"{name}: expected {layout}, got shape {tuple(value.shape)}")
    return value


def check_activation_tensor(name: str, value: object, rank: int | None = None) -> Tensor:
    """A floating strided tensor, of the given rank, with at least one channel in its last axis."""
    tensor = check_tensor(name, value)
    if tensor.dtype not in FLOATING:
        raise TypeError(f"{name}: expected one of {', '.join(map(short, FLOATING))}, got {short(tensor.dtype)}")
    if tensor.layout is not torch.strided:
        raise TypeError(f"{name}: expected a strided tensor, got {tensor.layout}")
    if rank is not None and tensor.ndim != rank:
        raise ValueError(f"{name}: expected {rank} dimensions, got shape {tuple(tensor.shape)}")
    if tensor.ndim < 1 or tensor.shape[-1] < 1:
        raise ValueError(f"{name}: expected at least one channel in the last axis, got shape {tuple(tensor.shape)}")
    return tensor


def check_parameter(
    name: str, value: object, shape: tuple[int, ...], like: Tensor, optional: bool = False
) -> Tensor | None:
    """A parameter of exactly this shape, on `like`'s device, in fp32 or `like`'s dtype (fp64 goes with fp64 only).

    Under autocast it may also have autocast's dtype.
    """
    if value is None and optional:
        return None
    if not (
        isinstance(value, Tensor)
        and value.shape == shape
        and (value.dtype is like.dtype or _goes_with(value.dtype, like))
        and value.device == like.device
    ):
        _reject_parameter(name, value, shape, like)
    return value  # type: ignore[return-value]


def check_vectors(names: Sequence[str], values: Sequence[object], length: int, like: Tensor) -> None:
    """Several optional parameters of shape `[length]`, as `check_parameter` checks each."""
    shape, dtype, device = (length,), like.dtype, like.device
    for name, value in zip(names, values, strict=True):
        if value is not None and not (
            isinstance(value, Tensor) and value.shape == shape and value.dtype is dtype and value.device == device
        ):
            check_parameter(name, value, shape, like)


def _goes_with(dtype: torch.dtype, like: Tensor) -> bool:
    return like.dtype is not torch.float64 and (dtype is torch.float32 or dtype is compute_dtype(like))


def _reject_parameter(name: str, value: object, shape: tuple[int, ...], like: Tensor) -> None:
    tensor = check_tensor(name, value)
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name}: expected shape {shape}, got {tuple(tensor.shape)}")
    check_device(name, tensor, like)
    wide = "" if like.dtype is torch.float64 else "float32 or "
    raise TypeError(
        f"{name}: {short(tensor.dtype)} parameters do not go with {short(like.dtype)} activations; "
        f"expected {wide}the activations' dtype"
    )


def check_device(name: str, tensor: Tensor, like: Tensor) -> None:
    if tensor.device != like.device:
        raise ValueError(f"{name}: expected device {like.device}, got {tensor.device}")


def check_residual(value: object, shape: tuple[int, ...], like: Tensor) -> Tensor:
    """The tensor added to a result of this shape: any floating dtype (fp64 goes with fp64 only), `like`'s device."""
    residual = check_activation_tensor("residual", value)
    if residual.shape != shape:
        raise ValueError(f"residual: expected shape {shape}, got {tuple(residual.shape)}")
    check_device("residual", residual, like)
    if (residual.dtype is torch.float64) != (like.dtype is torch.float64):
        raise TypeError(
            f"residual: {short(residual.dtype)} does not go with {short(like.dtype)} activations; "
            "expected float64 beside float64 only"
        )
    return residual


def check_map(grid: object, x: Tensor) -> tuple[int, int]:
    """The height and width of the map that all tokens of x make."""
    if not isinstance(grid, (tuple, list)) or len(grid) != 2:
        raise ValueError(f"grid: expected (H, W), got {grid!r}")
    height, width = check_integer("grid", grid[0], 1), check_integer("grid", grid[1], 1)
    if height * width != x.shape[1]:
        raise ValueError(f"grid: {height} x {width} do not make the {x.shape[1]} tokens of x")
    return height, width


def is_traced(value: object) -> bool:
    """Whether this is a tensor that stands for a number, as `torch.jit.trace` has them."""
    return isinstance(value, Tensor) and torch.jit.is_tracing()  # type: ignore[attr-defined,no-untyped-call]


def check_integer(name: str, value: object, least: int) -> int:
    """A Python integer, or what stands for one while a graph is made, of at least this."""
    if not (isinstance(value, (int, torch.SymInt)) or is_traced(value)) or isinstance(value, bool):
        raise TypeError(f"{name}: expected an integer, got {type(value).__name__}")
    if value < least:  # type: ignore[operator]
        raise ValueError(f"{name}: expected an integer of at least {least}, got {value}")
    return value  # type: ignore[return-value]


def check_grid(grid: object, num_prefix_tokens: int, x: Tensor) -> tuple[int, int]:
    """Height and width of the map that makes the tokens of x behind its prefix tokens."""
    check_integer("num_prefix_tokens", num_prefix_tokens, 0)
    if not isinstance(grid, (tuple, list)) or len(grid) != 2:
        raise ValueError(f"grid: expected (H, W) beside [B, P + H*W, C] tokens, got {grid!r}")
    height, width = check_integer("grid", grid[0], 1), check_integer("grid", grid[1], 1)
    if num_prefix_tokens + height * width != x.shape[1]:
        raise ValueError(
            f"grid: {height} x {width} and {num_prefix_tokens} prefix tokens do not make the {x.shape[1]} tokens of x"
        )
    return height, width


def check_flag(name: str, value: object) -> bool:
    """True or False, and nothing that merely counts as one of them: any word would count as True."""
    if not isinstance(value, bool):
        raise TypeError(f"{name}: expected a bool, got {type(value).__name__}")
    return value


def check_eps(name: str, value: object) -> float:
    """An epsilon: a number that is not negative."""
    return check_number(name, value, 0.0, math.inf)


def check_number(name: str, value: object, least: float, most: float) -> float:
    """A finite real number within these bounds."""
    if not isinstance(value, (float, int)) or isinstance(value, bool):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
    # Not math.isfinite: with dynamic shapes torch.compile traces numbers too, and cannot trace that.
    if not (least <= value <= most and -math.inf < value < math.inf):
        raise ValueError(f"{name}: expected a finite number in [{least:g}, {most:g}], got {value}")
    return float(value)


def check_norm(norm_weight: Tensor | None, norm_bias: Tensor | None, norm_eps: float | None, x: Tensor) -> float | None:
    """The LayerNorm in front of an operator; returns its epsilon, None for no normalisation."""
    if norm_eps is not None:
        norm_eps = check_eps("norm_eps", norm_eps)
    elif norm_weight is not None or norm_bias is not None:
        raise ValueError("norm_eps: expected the LayerNorm's epsilon beside norm_weight or norm_bias, got None")
    channels = x.shape[-1]
    check_vectors(("norm_weight", "norm_bias"), (norm_weight, norm_bias), channels, x)
    return norm_eps


def check_statistics(name: str, value: object, x: Tensor) -> None:
    """Mean and variance of each sample of x, `[B, 2]`, as operators return them."""
    statistics = check_tensor(name, value)
    dtype = torch.float64 if x.dtype is torch.float64 else torch.float32
    if statistics.shape != (x.shape[0], 2) or statistics.dtype is not dtype:
        raise ValueError(
            f"{name}: expected {short(dtype)} of shape {(x.shape[0], 2)}, "
            f"got {short(statistics.dtype)} of shape {tuple(statistics.shape)}"
        )
    check_device(name, statistics, x)


def check_norm_kind(
    kind: str | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float | None,
    statistics: Tensor | None,
    x: Tensor,
) -> tuple[str, float]:
    """The norm in front of an operator, of one of several kinds; returns its name in the schema and its epsilon."""
    if kind is None:
        for name, value in (("weight", weight), ("bias", bias), ("eps", eps), ("statistics", statistics)):
            if value is not None:
                raise ValueError(f'norm: expected "layer" or "group" beside norm_{name}, got None')
        return "none", 0.0
    if kind not in ("layer", "group"):
        raise ValueError(f'norm: expected "layer", "group" or None, got {kind!r}')
    if eps is None:
        raise ValueError("norm_eps: expected the norm's epsilon beside norm, got None")
    check_vectors(("norm_weight", "norm_bias"), (weight, bias), x.shape[-1], x)
    if statistics is not None:
        check_tensor("norm_statistics", statistics)
        if kind != "group":
            raise ValueError(f'norm_statistics: expected them with norm="group" only, got norm={kind!r}')
        check_statistics("norm_statistics", statistics, x)
    return kind, check_eps("norm_eps", eps)


def autocast_is_on(device: str) -> bool:
    """Whether autocast is on for this device type; torch itself raises for `meta`."""
    return device != "meta" and torch.is_autocast_enabled(device)


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype of matrix products: autocast's where it is on (fp64 is left alone, as autocast itself does)."""
    device = x.device.type
    if x.dtype is not torch.float64 and autocast_is_on(device):
        return torch.get_autocast_dtype(device)
    return x.dtype
