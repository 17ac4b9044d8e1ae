"""Checks of the kernels on a device, for its tests and for the benchmark, which runs them before it times anything."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastvit_kernels import _extension, use_backend
from fastvit_kernels.ops import library, triton_support
from fastvit_kernels.ops.operator import BackwardBackend
from fastvit_kernels.testing.calls import Call, Results, as_list, cotangents
from fastvit_kernels.testing.contract.base import ContractBase, expected, forward, run
from fastvit_kernels.testing.contract.base import check as hold_to_rule
from fastvit_kernels.testing.inputs import BF16, BF16_FP32, CASES, FP16, FP32, Case
from fastvit_kernels.testing.numerics import NumericsError
from fastvit_kernels.testing.raw import raw_call

BACKENDS = ("triton", "cuda", "sdpa")
PRECISIONS = {str(precision): precision for precision in (FP32, BF16, BF16_FP32, FP16)}
FORWARD, GRADIENTS, GRAPH, TRAINING_GRAPH = "forward", "gradients", "graph", "graph of gradients"
# Those of a training step.
OF_TRAINING = (GRADIENTS, TRAINING_GRAPH)


class Check(NamedTuple):
    """One thing that must hold on a device.

    Attributes:
        operator, case, precision: the call, as in `fastvit_kernels.testing.inputs`.
        backend: asked for by name.
        what: `"forward"` and `"gradients"` are within the numerics rule; a captured `"graph"` of the call, or a `"graph
            of gradients"` of forward and backward, waits for nothing, and a replay gives what the calls gave: to the
            bit, but for gradients of `sdpa`, which are within the rule.
    """

    operator: str
    case: str
    precision: str
    backend: str
    what: str

    def __str__(self) -> str:
        return "-".join(self)


def problems(device: torch.device) -> dict[str, str]:
    """Why backends for GPUs cannot run anything there; those that can are not listed."""
    elsewhere = None if device.type == "cuda" else f"the CUDA kernels run on GPUs, not on {device.type}"
    found = {"triton": triton_support.machine_problem(device), "cuda": _extension.parts["cuda"].problem or elsewhere}
    return {name: problem for name, problem in found.items() if problem is not None}


def checks(backends: Iterable[str] = BACKENDS, precisions: Iterable[str] = tuple(PRECISIONS)) -> list[Check]:
    """Those of every operator and case that the kernels take."""
    backends, precisions = list(backends), list(precisions)
    found = []
    for operator, cases in CASES.items():
        for name in backends:
            backend = next((b for b in library.operators[operator].backends if b.name == name), None)
            if backend is None:
                continue
            for case in cases:
                for precision in precisions:
                    if refusals(name, operator, *raw_call(case.call(PRECISIONS[precision]))):
                        continue
                    kinds = _kinds(case, precision, isinstance(backend, BackwardBackend))
                    found += [Check(operator, str(case), precision, name, what) for what in kinds]
    return found


def _kinds(case: Case, precision: str, has_gradients: bool) -> list[str]:
    """What is checked of a case that a backend takes; one whose gradients are another's shows it on few."""
    smallest = "smallest" in case.tags
    found = [FORWARD]
    found += [GRADIENTS] if has_gradients or smallest else []
    found += [GRAPH] if smallest and precision == str(BF16) else []
    found += [TRAINING_GRAPH] if smallest and precision == str(BF16_FP32) else []
    return found


def refusals(backend: str, operator: str, tensors: Sequence[Tensor | None], static: Any) -> list[str]:
    """Why a backend does not take a call, but for the reasons of this machine."""
    first = tensors[0]
    assert first is not None
    of_machine = {f"tensors are on {first.device.type}", _extension.parts["cuda"].problem}
    of_machine.add(triton_support.machine_problem(first.device))
    found = next(b for b in library.operators[operator].backends if b.name == backend)
    return [reason for reason in found.supports(tensors, static) if reason not in of_machine]


def run_check(check: Check, device: str, capture: Callable[[Callable[[], Any]], Callable[[], Any]]) -> None:
    """Raise unless it holds.

    Args:
        check: what.
        device: where the call's tensors are moved.
        capture: makes a function that replays what a call did into the same results; for a check of a graph.

    Raises:
        NumericsError: it does not hold.
        BackendError: the kernels refuse the call.
    """
    case = next(case for case in CASES[check.operator] if str(case) == check.case)
    if check.what in (GRAPH, TRAINING_GRAPH):
        _check_graph(case, check, device, capture)
    else:
        of_results = run if check.what == GRADIENTS else forward
        ContractBase().hold(case, PRECISIONS[check.precision], partial(_on_device, of_results, check.backend, device))


def _on_device(of_results: Callable[..., Results], backend: str, device: str, call: Call) -> Results:
    found = of_results(call.map(lambda t: t.to(device)), backend=backend)
    return Results(
        [o.cpu() for o in found.outputs],
        {name: g if g is None else g.cpu() for name, g in found.gradients.items()},
        {name: b.cpu() for name, b in found.buffers.items()},
    )


def _check_graph(case: Case, check: Check, device: str, capture: Callable[..., Callable[[], Any]]) -> None:
    call = case.call(PRECISIONS[check.precision]).map(lambda t: t.to(device))
    with use_backend(check.backend):
        step = _gradients_of(call) if check.what == TRAINING_GRAPH else _outputs_of(call)
        wanted = [t.clone() for t in step()]
        replay = capture(step)
        for result in replay():
            result.fill_(float("nan"))
        found = replay()
    if check.backend == "sdpa" and check.what == TRAINING_GRAPH:
        # PyTorch's attention may add gradients up in another order every time.
        exact, low = expected(case, PRECISIONS[check.precision])
        names = [name for name, gradient in exact.gradients.items() if gradient is not None]
        gradients = {name: f.cpu() for name, f in zip(names, found, strict=True)}
        hold_to_rule(Results([], gradients, {}), exact._replace(outputs=[]), low._replace(outputs=[]), case.vanishing)
    elif not all(torch.equal(f, w) for f, w in zip(found, wanted, strict=True)):
        raise NumericsError("a replay of the graph gives something else than the call")


def _outputs_of(call: Call) -> Callable[[], list[Tensor]]:
    def step() -> list[Tensor]:
        with torch.no_grad():
            return as_list(call())

    return step


def _gradients_of(call: Call) -> Callable[[], list[Tensor]]:
    """Forward and backward, to the gradients of all leaves that have one."""
    leaves = [leaf.requires_grad_() for leaf in call.leaves().values()]
    # Made once: a graph copies nothing from elsewhere.
    slopes = cotangents([output.detach() for output in as_list(call())])

    def step() -> list[Tensor]:
        # A residual's gradient is that of the result, which must not be the next call's.
        found = torch.autograd.grad(as_list(call()), leaves, [s.clone() for s in slopes], allow_unused=True)
        return [gradient for gradient in found if gradient is not None]

    return step
