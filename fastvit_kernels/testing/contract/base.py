"""What the parts of the contract suite share: the cases, the backends, and the reference's results."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastvit_kernels import use_backend
from fastvit_kernels.ops import library
from fastvit_kernels.testing.calls import Call, Results, as_list, cotangents, differentiate
from fastvit_kernels.testing.inputs import BF16, BF16_FP32, FP16, FP32, Case, Precision, tagged
from fastvit_kernels.testing.numerics import NumericsError, assert_within_rule

Grads = Callable[[Sequence[Tensor]], Sequence[Tensor]]

NAMESPACE = f"{library.NAMESPACE}."

# How much larger than the reference's the noise in a gradient that is exactly zero may be. Both are random.
_NOISE = 4.0
_MOST_DRAWS = 16


class ContractBase:
    """What an inheriting test class states, and how pytest is told about it.

    Attributes:
        cases: the calls under test; at least one is tagged `smallest`.
        fused: operators that a compiled graph must contain when the C++ CPU kernels run.
        precisions: by backend, what it computes in.
        small_only: backends that are too slow, or too little our own, for more than the `smallest` cases.
        equivalent: the same mathematics in plain PyTorch, written apart from the reference: arguments in, outputs out;
            for a module's cases the module comes first.
        reshaped: a few calls that differ in size only, and for each argument the axes that differ.
        draws: from how many draws of the inputs errors are taken together. One is enough where kernel and reference
            compute alike; where their errors are independent, as behind several operators in a row, the largest of a
            dozen elements is too random.
    """

    cases: ClassVar[Sequence[Case]]
    fused: ClassVar[tuple[str, ...]] = ()
    precisions: ClassVar[dict[str, tuple[Precision, ...]]] = {"cpu": (FP32, BF16, BF16_FP32), "triton": (FP32, FP16)}
    small_only: ClassVar[frozenset[str]] = frozenset({"triton", "sdpa"})
    equivalent: ClassVar[Callable[..., Any]]
    reshaped: ClassVar[tuple[Sequence[Case], dict[str, tuple[int, ...]]]]
    draws: ClassVar[int] = 1

    def hold(
        self,
        case: Case,
        precision: Precision,
        run: Callable[[Call], Results],
        change: Callable[[Call], Call] | None = None,
        grads: Grads = cotangents,
    ) -> None:
        """Hold what `run` makes of a case (changed, with these output gradients) to the numerics rule.

        One draw can break the rule by chance, above all where the largest error hangs on few numbers, and which draw
        does depends on the processor that the reference runs on. More draws, judged together, tell: an error that is
        no accident does not come within the rule, however many they are.
        """
        found: list[Results] = []
        exact: list[Results] = []
        low: list[Results] = []
        while True:
            for seed in range(len(found), max(self.draws, min(2 * len(found), _MOST_DRAWS))):
                call = case.call(precision, seed)
                if change is None and grads is cotangents:
                    references = expected(case, precision, seed)
                else:
                    call = call if change is None else change(call)
                    references = reference_results(call, grads)
                found.append(run(call))
                exact.append(references[0])
                low.append(references[1])
            try:
                return check(pooled(found), pooled(exact), pooled(low), case.vanishing)
            except NumericsError:
                if len(found) >= _MOST_DRAWS:
                    raise

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


def run(call: Call, backend: str, grads: Grads = cotangents) -> Results:
    """Outputs, gradients and updated buffers on one backend."""
    with use_backend(backend):
        return differentiate(call, grads=grads)


def forward(call: Call, backend: str) -> Results:
    """Outputs and updated buffers on one backend, without autograd."""
    call = call.fresh()
    with use_backend(backend), torch.no_grad():
        outputs = as_list(call())
    return Results(outputs, {}, call.buffers())


def operator_calls(call: Call, backend: str) -> list[tuple[Any, tuple[Any, ...]]]:
    """The registered operators, with arguments, that one forward and backward call."""
    found: list[tuple[Any, tuple[Any, ...]]] = []

    class Listen(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if str(func).startswith(NAMESPACE):
                found.append((func, args))
            return func(*args, **(kwargs or {}))

    with use_backend(backend), Listen():  # type: ignore[no-untyped-call]
        differentiate(call)
    return found


def backward_operators(call: Call, backend: str) -> set[str]:
    """Names of the operators, with their overloads, that the backward calls."""
    return {str(op) for op, _ in operator_calls(call, backend) if "_backward." in str(op)}


@lru_cache(maxsize=512)
def expected(case: Case, precision: Precision, seed: int = 0) -> tuple[Results, Results]:
    """The reference's results in fp64 and in the call's own precision, from the same inputs and output gradients."""
    return reference_results(case.call(precision, seed))


def reference_results(call: Call, grads: Grads = cotangents) -> tuple[Results, Results]:
    """As `expected`, for any call."""
    given: list[Tensor] = []

    def record(outputs: Sequence[Tensor]) -> Sequence[Tensor]:
        given.extend(grads(outputs))
        return given

    with use_backend("reference"):
        low = differentiate(call, grads=record)
        exact = differentiate(call.fp64(), grads=lambda outputs: [g.double() for g in given])
    return exact, low


def pooled(draws: Sequence[Results]) -> Results:
    """Several results as one, each tensor stacked with its likes."""
    if len(draws) == 1:
        return draws[0]
    outputs = [torch.stack(tensors) for tensors in zip(*(d.outputs for d in draws), strict=True)]
    gradients = {name: _stack([d.gradients[name] for d in draws]) for name in draws[0].gradients}
    buffers = {name: torch.stack([d.buffers[name] for d in draws]) for name in draws[0].buffers}
    return Results(outputs, gradients, buffers)


def _stack(gradients: Sequence[Tensor | None]) -> Tensor | None:
    present = [g for g in gradients if g is not None]
    if present and len(present) < len(gradients):
        raise NumericsError("a gradient is there for some draws of the inputs only")
    return torch.stack(present) if present else None


def check(found: Results, exact: Results, low: Results, vanishing: Iterable[str] = ()) -> None:
    """Hold outputs, gradients and buffers to the numerics rule.

    `vanishing` names the gradients that are exactly zero: they may hold noise of the size of the reference's own, and
    rounding of the other gradients. So may those that these output gradients make zero, as a constant one does in front
    of a batch norm.
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
        elif name in vanishing or _is_noise(low.gradients[name], wanted):
            lower = low.gradients[name]
            assert lower is not None
            noise = float(gradient.abs().max())
            allowed = _NOISE * float(lower.abs().max()) + largest * torch.finfo(gradient.dtype).eps
            if not noise <= allowed:
                raise NumericsError(f"gradient of {name}: got {noise:.3e}, expected zero within {allowed:.3e}")
        else:
            lower = low.gradients[name]
            assert lower is not None
            assert_within_rule(gradient, (wanted, lower), name=f"gradient of {name}")


def _is_noise(lower: Tensor | None, exact: Tensor) -> bool:
    """Whether the reference in low precision holds nothing but rounding errors."""
    if lower is None or not exact.numel():
        return False
    return float(exact.abs().max()) <= 1e-6 * float(lower.abs().max())


def _presence(gradient: Tensor | None) -> str:
    return "none" if gradient is None else "one"
