"""The numerics rule: how far a kernel may be from the reference.

With `y64` the reference in fp64 and `y_low` the reference in the kernel's dtype, both from the same inputs::

    error(kernel) <= 2 * error(y_low) + eps(dtype) * max|y64|

for the largest elementwise error and, relative to the norm of `y64`, for the L2 error; nothing is NaN or infinite where
the reference is finite. No option and no environment variable loosens it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

FACTOR = 2.0
_SHOWN = 5


class NumericsError(AssertionError):
    """A result is outside the numerics rule."""


class Measured(NamedTuple):
    """What `assert_within_rule` measured: errors against `y64` and the errors the rule allows."""

    largest: float
    largest_allowed: float
    relative_l2: float
    relative_l2_allowed: float


def relative_l2(actual: Tensor, expected: Tensor) -> float:
    """`||actual - expected|| / ||expected||` in fp64; 0 when both are zero or empty, infinite against a zero norm."""
    actual, expected = actual.detach().double(), expected.detach().double()
    difference, norm = float((actual - expected).norm()), float(expected.norm())
    if difference == 0.0:
        return 0.0
    return difference / norm if norm else float("inf")


def to_fp64(tree: Any) -> Any:
    """The same nested arguments with every floating tensor in fp64."""
    return pytree.tree_map(
        lambda leaf: leaf.detach().double() if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf, tree
    )


def assert_within_rule(
    actual: Tensor | Sequence[Tensor],
    reference: Callable[..., Any] | tuple[Any, Any],
    *inputs: Any,
    name: str = "output",
) -> list[Measured]:
    """Raise unless `actual` keeps the numerics rule (see the module's docstring).

    Args:
        actual: a kernel's result, one tensor or several.
        reference: the pair `(y64, y_low)`, each one tensor or as many as `actual` has; or a function of `inputs` that
            returns such, called with the inputs in fp64 and then with the inputs as they are.
        *inputs: what the function takes, in the kernel's dtype; tensors may be nested.
        name: how messages call the result.

    Returns:
        The measured and allowed errors, one entry per tensor.

    Raises:
        NumericsError: the rule is broken; shapes, dtypes or the number of results differ; or something is not finite
            where the reference is.
        ValueError: the reference itself overflows in the kernel's dtype, so it would allow any error.
    """
    exact, low = (reference(*to_fp64(inputs)), reference(*inputs)) if callable(reference) else reference
    found, exact, low = _as_list(actual), _as_list(exact), _as_list(low)
    if not len(found) == len(exact) == len(low):
        raise NumericsError(f"{name}: got {len(found)} results, expected {len(exact)} (fp64) and {len(low)}")
    single = isinstance(actual, Tensor)
    # Statistics in fp32 that come with a bf16 result are those of rounded values.
    eps = max((torch.finfo(t.dtype).eps for t in found), default=0.0)
    return [
        _check(a, y64, y_low, name if single else f"{name}[{index}]", eps)
        for index, (a, y64, y_low) in enumerate(zip(found, exact, low, strict=True))
    ]


def _as_list(results: Any) -> list[Tensor]:
    return [results] if isinstance(results, Tensor) else list(results)


def _check(actual: Tensor, y64: Tensor, y_low: Tensor, name: str, eps: float) -> Measured:
    if actual.shape != y64.shape or actual.shape != y_low.shape:
        raise NumericsError(f"{name}: got shape {tuple(actual.shape)}, expected {tuple(y64.shape)}")
    if y64.dtype != torch.float64:
        raise ValueError(f"{name}: expected the exact reference in float64, got {y64.dtype}")
    if actual.dtype != y_low.dtype:
        raise NumericsError(f"{name}: got {actual.dtype}, expected {y_low.dtype} as the reference gives")
    if actual.numel() == 0:
        return Measured(0.0, 0.0, 0.0, 0.0)
    # Where the truth is: results of a whole batch take seconds to copy from a GPU.
    found, y64, y_low = (t.detach().to(y64.device, torch.float64) for t in (actual, y64, y_low))
    finite = y64.isfinite()
    if bool((finite & ~y_low.isfinite()).any()):
        raise ValueError(f"{name}: the reference overflows in {actual.dtype}, so the rule would allow any error")
    wrong_kind = found.isfinite() != finite
    if bool(wrong_kind.any()):
        what = "values are NaN or infinite where the reference is finite, or the reverse"
        raise NumericsError(
            f"{name}: {int(wrong_kind.sum())} of {found.numel()} {what}\n" + _list(wrong_kind, found, y64)
        )
    # Places where the reference is not finite have been compared; they must not enter the norms.
    zero = torch.zeros((), dtype=torch.float64, device=y64.device)
    found, y64, y_low = (torch.where(finite, t, zero) for t in (found, y64, y_low))

    errors = (found - y64).abs()
    band = eps * float(y64.abs().max())
    low_largest = float((y_low - y64).abs().max())
    low_l2 = relative_l2(y_low, y64)
    measured = Measured(
        float(errors.max()), FACTOR * low_largest + band, relative_l2(found, y64), FACTOR * low_l2 + eps
    )
    if measured.largest <= measured.largest_allowed and measured.relative_l2 <= measured.relative_l2_allowed:
        return measured
    dtype = str(actual.dtype).removeprefix("torch.")
    beyond = errors > measured.largest_allowed
    if not bool(beyond.any()):
        beyond = errors == errors.max()
    raise NumericsError(
        f"{name}: outside the numerics rule ({dtype}, shape {tuple(actual.shape)})\n"
        f"  largest error {measured.largest:.3e}, allowed {measured.largest_allowed:.3e}"
        f" = {FACTOR:g} x {low_largest:.3e} (reference in {dtype}) + {band:.3e}\n"
        f"  relative L2   {measured.relative_l2:.3e}, allowed {measured.relative_l2_allowed:.3e}"
        f" = {FACTOR:g} x {low_l2:.3e} + {eps:.3e}\n" + _list(beyond, found, y64)
    )


def _list(where: Tensor, found: Tensor, expected: Tensor) -> str:
    places = where.nonzero()
    lines = [f"  first of {len(places)} places:"]
    for place in places[:_SHOWN].tolist():
        index = tuple(place)
        got, wanted = float(found[index]), float(expected[index])
        lines.append(f"    {index}: got {got:.9g}, expected {wanted:.9g}, error {abs(got - wanted):.3e}")
    return "\n".join(lines)
