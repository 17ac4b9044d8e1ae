"""Argument checks shared by the operators: every message names the argument, what came and what was expected."""

from __future__ import annotations

import torch
from torch import Tensor

FLOATING = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def check_tensor(name: str, value: object) -> Tensor:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(value).__name__}")
    return value


def check_activation_tensor(name: str, value: object, rank: int | None = None) -> Tensor:
    """A floating tensor of the given rank."""
    tensor = check_tensor(name, value)
    if tensor.dtype not in FLOATING:
        raise TypeError(f"{name}: expected one of {', '.join(map(short, FLOATING))}, got {short(tensor.dtype)}")
    if rank is not None and tensor.ndim != rank:
        raise ValueError(f"{name}: expected {rank} dimensions, got shape {tuple(tensor.shape)}")
    return tensor


def check_parameter(
    name: str, value: object, shape: tuple[int, ...], like: Tensor, optional: bool = False
) -> Tensor | None:
    """A parameter of exactly this shape, on `like`'s device, in fp32 or `like`'s dtype (fp64 goes with fp64 only)."""
    if value is None and optional:
        return None
    tensor = check_tensor(name, value)
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name}: expected shape {shape}, got {tuple(tensor.shape)}")
    if tensor.device != like.device:
        raise ValueError(f"{name}: expected device {like.device}, got {tensor.device}")
    if tensor.dtype not in FLOATING or (tensor.dtype == torch.float64) != (like.dtype == torch.float64):
        raise TypeError(
            f"{name}: {short(tensor.dtype)} parameters do not go with {short(like.dtype)} activations; "
            "expected float32 or the activations' dtype"
        )
    return tensor


def check_positive(name: str, value: int) -> int:
    if value < 1:
        raise ValueError(f"{name}: expected a positive integer, got {value}")
    return value


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype of matrix products: autocast's where it is on (fp64 is left alone, as autocast itself does)."""
    device = x.device.type
    if x.dtype != torch.float64 and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return x.dtype


def dense(x: Tensor) -> Tensor:
    """`x` itself when its memory is row-major, one explicit copy otherwise."""
    return x if x.is_contiguous() else x.contiguous()
