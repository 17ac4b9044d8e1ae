"""What the modules are given, checked in their own words: the operators behind them would name other arguments.

As in `ops.arguments`, a good argument is recognised in one expression. Proxies of `torch.fx` have no shape to judge;
they pass, as they pass through plain PyTorch modules.
"""

from __future__ import annotations

import operator

import torch
from torch import Tensor, nn
from torch.fx import Proxy

from fastvit_kernels.ops.arguments import check_integer, check_tensor, is_traced


def check_any_tensor(name: str, value: object) -> None:
    """A tensor of any shape."""
    if not isinstance(value, Tensor):
        _reject(name, value, "")


def check_rows(name: str, value: object, channels: int | None) -> None:
    """Rows are `[..., channels]`."""
    if not (isinstance(value, Tensor) and value.ndim > 0 and (channels is None or value.shape[-1] == channels)):
        _reject(name, value, f"[..., {_width(channels)}]")


def check_tokens(value: object, channels: int | None) -> None:
    """x is `[B, N, channels]`."""
    if not (isinstance(value, Tensor) and value.ndim == 3 and (channels is None or value.shape[2] == channels)):
        _reject("x", value, f"[B, N, {_width(channels)}] tokens")


def check_map(name: str, value: object, channels: int | None) -> None:
    """A map is `[B, channels, H, W]`."""
    if not (isinstance(value, Tensor) and value.ndim == 4 and (channels is None or value.shape[1] == channels)):
        _reject(name, value, f"a map [B, {_width(channels)}, H, W]")


def check_tokens_of_map(
    value: object, h: object, w: object, channels: int | None, num_prefix_tokens: int = 0
) -> tuple[int, int]:
    """x is `[B, P + h*w, channels]`; returns h and w as Python has them."""
    if not (type(h) is int and type(w) is int and h > 0 and w > 0):
        h, w = as_integer("h", h, 1), as_integer("w", w, 1)
    if not (
        isinstance(value, Tensor)
        and value.ndim == 3
        and value.shape[1] == num_prefix_tokens + h * w
        and (channels is None or value.shape[2] == channels)
    ):
        prefix = f"{num_prefix_tokens} + " if num_prefix_tokens else ""
        _reject("x", value, f"[B, {prefix}{h} * {w}, {_width(channels)}] tokens", f" beside h, w = {h}, {w}")
    return h, w


def as_integer(name: str, value: object, least: int | None = None) -> int:
    """An integer of any class, NumPy's included, which the original modules take as well."""
    if not isinstance(value, (int, torch.SymInt)) and not is_traced(value):
        try:
            value = operator.index(value)  # type: ignore[arg-type]
        except TypeError:
            raise TypeError(f"{name}: expected an integer, got {type(value).__name__}") from None
    return check_integer(name, value, -(2**63) if least is None else least)


def input_channels(layer: nn.Module | None) -> int | None:
    """The channels that a linear, a convolution or a sequence behind one takes; None where it does not say."""
    if isinstance(layer, nn.Sequential):
        layer = next(iter(layer._modules.values()), None)
    return getattr(layer, "in_features", None) or getattr(layer, "in_channels", None)


def add_residual(residual: Tensor | None, out: Tensor) -> Tensor:
    """`residual + out`, without broadcasting: the operators do not either."""
    if residual is None:
        return out
    if not isinstance(residual, Tensor) or residual.shape != out.shape:
        check_residual_shape(residual, tuple(out.shape))
    return residual + out


def check_residual_shape(residual: object, shape: tuple[int, ...]) -> None:
    """Refuse a residual that has another shape: as rows of a map it might have as many pixels all the same."""
    if residual is None or isinstance(residual, Proxy):
        return
    if check_tensor("residual", residual).shape != shape:
        raise ValueError(f"residual: expected shape {tuple(shape)}, got {tuple(residual.shape)}")  # type: ignore[attr-defined]


def _width(channels: int | None) -> object:
    return "C" if channels is None else channels


def _reject(name: str, value: object, expected: str, beside: str = "") -> None:
    if isinstance(value, Proxy):
        return
    shape = tuple(check_tensor(name, value).shape)
    raise ValueError(f"{name}: expected {expected}, got shape {shape}{beside}")
