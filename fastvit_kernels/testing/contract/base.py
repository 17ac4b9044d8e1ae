"""What the parts of the contract suite share: the cases, the backends, and the reference's results."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from typing import Any, ClassVar

import torch
from torch import Tensor

from fastvit_kernels import use_backend
from fastvit_kernels.testing.calls import Call, Results, as_list, cotangents, differentiate
from fastvit_kernels.testing.inputs import BF16, BF16_FP32, FP16, FP32, Case, Precision, tagged
from fastvit_kernels.testing.numerics import NumericsError, assert_within_rule


class ContractBase:
    """What an inheriting test class states, and how pytest is told about it.

    Attributes:
        cases: the calls under test; at least one is tagged `smallest`.
        fused: operators that a compiled graph must contain when the C++ CPU kernels run.
        precisions: by backend, what it computes in.
        small_only: backends too slow for more than the `smallest` cases.
        equivalent: the same mathematics in plain PyTorch, written apart from the reference: arguments in, outputs out.
        reshaped: a few calls that differ in size only, and for each argument the axes that differ.
    """

    cases: ClassVar[Sequence[Case]]
    fused: ClassVar[tuple[str, ...]] = ()
    precisions: ClassVar[dict[str, tuple[Precision, ...]]] = {"cpu": (FP32, BF16, BF16_FP32), "triton": (FP32, FP16)}
    small_only: ClassVar[frozenset[str]] = frozenset({"triton"})
    equivalent: ClassVar[Callable[..., Any]]
    reshaped: ClassVar[tuple[Sequence[Case], dict[str, tuple[int, ...]]]]

    def pytest_generate_tests(self, metafunc: Any) -> None:
        names = set(metafunc.fixturenames)
        if "case" in names:
            chosen = getattr(metafunc.function, "case_tags", ())
            cases = tagged(self.cases, *chosen) if chosen else self.cases
            assert cases, f"{type(self).__name__} has no case tagged {chosen}"
            self._parametrize(metafunc, names, cases)

    def _parametrize(self, metafunc: Any, names: set[str], cases: Iterable[Case]) -> None:
        axes: dict[str, list[Any]] = {"case": list(cases)}
        if "backend" in names:
            axes["backend"] = list(self.precisions)
        rows = [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]
        rows = [row for row in rows if row.get("backend") not in self.small_only or "smallest" in row["case"].tags]
        if "precision" in names:
            rows = [row | {"precision": p} for row in rows for p in self.precisions[row["backend"]]]
        keys = list(rows[0])
        metafunc.parametrize(
            keys, [tuple(row.values()) for row in rows], ids=["-".join(map(str, row.values())) for row in rows]
        )


def on_cases(*tags: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Restrict a check to the cases that carry one of these tags."""

    def mark(function: Callable[..., None]) -> Callable[..., None]:
        function.case_tags = tags  # type: ignore[attr-defined]
        return function

    return mark


def run(call: Call, backend: str) -> Results:
    """Outputs, gradients and updated buffers on one backend."""
    with use_backend(backend):
        return differentiate(call)


def forward(call: Call, backend: str) -> Results:
    """Outputs and updated buffers on one backend, without autograd."""
    call = call.fresh()
    with use_backend(backend), torch.no_grad():
        outputs = as_list(call())
    return Results(outputs, {}, call.buffers())


@lru_cache(maxsize=256)
def expected(case: Case, precision: Precision) -> tuple[Results, Results]:
    """The reference's results in fp64 and in the call's own precision, from the same inputs and output gradients."""
    return reference_results(case.call(precision))


def reference_results(
    call: Call, grads: Callable[[Sequence[Tensor]], Sequence[Tensor]] = cotangents
) -> tuple[Results, Results]:
    """As `expected`, for any call."""
    given: list[Tensor] = []

    def record(outputs: Sequence[Tensor]) -> Sequence[Tensor]:
        given.extend(grads(outputs))
        return given

    with use_backend("reference"):
        low = differentiate(call, grads=record)
        exact = differentiate(call.fp64(), grads=lambda outputs: [g.double() for g in given])
    return exact, low


def check(found: Results, exact: Results, low: Results, vanishing: Iterable[str] = ()) -> None:
    """Hold outputs, gradients and buffers to the numerics rule.

    `vanishing` names the gradients that are exactly zero: they may hold rounding noise of the size of the others.
    """
    assert_within_rule(found.outputs, (exact.outputs, low.outputs))
    for name, tensor in found.buffers.items():
        assert_within_rule(tensor, (exact.buffers[name], low.buffers[name]), name=name)
    largest = max((float(g.abs().max()) for g in exact.gradients.values() if g is not None and g.numel()), default=0.0)
    for name, gradient in found.gradients.items():
        wanted = exact.gradients[name]
        if gradient is None or wanted is None:
            if gradient is not wanted:
                raise NumericsError(f"gradient of {name}: got {_presence(gradient)}, expected {_presence(wanted)}")
        elif name in vanishing:
            noise = float(gradient.abs().max())
            allowed = largest * torch.finfo(gradient.dtype).eps * gradient.numel() ** 0.5
            if not noise <= allowed:
                raise NumericsError(f"gradient of {name}: got {noise:.3e}, expected zero within {allowed:.3e}")
        else:
            lower = low.gradients[name]
            assert lower is not None
            assert_within_rule(gradient, (wanted, lower), name=f"gradient of {name}")


def _presence(gradient: Tensor | None) -> str:
    return "none" if gradient is None else "one"
