"""torch.compile, torch.export, tracing and the operator registrations behind them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.testing import AotEagerAndRecordGraphs
from torch.utils._python_dispatch import TorchDispatchMode

from fastvit_kernels import use_backend
from fastvit_kernels.ops import library
from fastvit_kernels.testing.calls import Call, Results, as_list, differentiate
from fastvit_kernels.testing.contract.base import (
    ContractBase,
    check,
    expected,
    on_cases,
)
from fastvit_kernels.testing.inputs import FP32, Case

_NAMESPACE = f"{library.NAMESPACE}."


class Compilation(ContractBase):
    """Compiled, exported and traced programs compute what eager ones do."""

    @on_cases("smallest", "empty", "map")
    def test_compiled_keeps_the_fused_operators(self, case: Case) -> None:
        """The whole call is one graph, with gradients and without, and the graph holds the operators themselves."""
        exact, low = expected(case, FP32)
        for with_gradients in (False, True):
            recorder = AotEagerAndRecordGraphs()
            check(_compiled(case.call(FP32), with_gradients, recorder), exact, low, case.vanishing)
            targets = _targets(recorder.fw_graphs)
            for name in self.fused:
                assert any(t == f"{_NAMESPACE}{name}.default" for t in targets), f"{name} is not in {targets}"
            if with_gradients:
                backward = _targets(recorder.bw_graphs)
                assert all(f"{_NAMESPACE}{name}_backward.default" in backward for name in self.fused), backward

    @on_cases("inductor")
    def test_compiled_by_inductor(self, case: Case) -> None:
        exact, low = expected(case, FP32)
        check(_compiled(case.call(FP32), True, "inductor"), exact, low, case.vanishing)

    def test_compiled_once_for_all_sizes(self) -> None:
        cases, axes = self.reshaped
        for with_gradients in (False, True):
            torch._dynamo.reset()
            with torch._dynamo.config.patch(error_on_recompile=True):
                compiled: dict[str, Callable[..., Any]] = {}
                for case in cases:
                    exact, low = expected(case, FP32)
                    found = _run(case.call(FP32), with_gradients, "aot_eager", axes, compiled)
                    check(found, exact, low, case.vanishing)

    @on_cases("smallest")
    def test_compiled_with_every_number_dynamic(self, case: Case) -> None:
        """`dynamic=True` makes symbols of the Python numbers among the arguments, too."""
        exact, low = expected(case, FP32)
        with _compiler_state(), use_backend("cpu"):
            compile_ = partial(torch.compile, fullgraph=True, dynamic=True, backend="aot_eager")
            found = differentiate(case.call(FP32), lambda fresh: compile_(fresh.function)(**fresh.arguments))
        check(found, exact, low, case.vanishing)

    def test_compiled_notices_another_backend(self) -> None:
        case = next(c for c in self.cases if "smallest" in c.tags)
        call = case.call(FP32).fresh()
        recorder = AotEagerAndRecordGraphs()
        with _compiler_state(), torch.no_grad():
            compiled = torch.compile(call.function, fullgraph=True, backend=recorder)
            for backend in ("cpu", "reference", "cpu"):
                with use_backend(backend):
                    compiled(**call.arguments)
        fused = [any(t.startswith(_NAMESPACE) for t in _targets([g])) for g in recorder.fw_graphs]
        assert fused == [True, False]

    @on_cases("smallest", "map")
    def test_exported_graph_is_plain_pytorch(self, case: Case) -> None:
        call = case.call(FP32).fresh()
        leaves = call.leaves() | call.buffers()
        with use_backend("auto"):
            program = torch.export.export(_Exportable(call), tuple(leaves.values()))
        assert not [t for t in _targets([program.graph_module]) if t.startswith(_NAMESPACE)]
        exact, low = expected(case, FP32)
        with torch.no_grad():
            outputs = as_list(program.module()(*(t.detach().clone() for t in leaves.values())))
        check(Results(outputs, {}, {}), exact, low)

    @on_cases("smallest", "map")
    def test_traced_graph_is_plain_pytorch(self, case: Case) -> None:
        call = case.call(FP32).fresh()
        leaves = call.leaves() | call.buffers()
        exact, low = expected(case, FP32)
        with warnings.catch_warnings(), torch.no_grad():
            # Sizes become constants of a traced graph (torch warns at each comparison), and tracing is deprecated.
            warnings.simplefilter("ignore")
            traced = torch.jit.trace(_Exportable(call), tuple(t.clone() for t in leaves.values()), check_trace=False)
            outputs = as_list(traced(*(t.clone() for t in leaves.values())))
        assert not [n for n in traced.inlined_graph.nodes() if n.kind().startswith(f"{library.NAMESPACE}::")]
        check(Results(outputs, {}, {}), exact, low)

    @on_cases("smallest", "empty")
    def test_operator_registrations(self, case: Case) -> None:
        """torch.library.opcheck on every registered operator the call runs, forward and backward."""
        calls = _operator_calls(case.call(FP32))
        assert {str(op).split(".")[1] for op, _ in calls} >= set(self.fused)
        for op, arguments in calls:
            torch.library.opcheck(op, arguments)


class _Exportable(torch.nn.Module):
    """A call as a module of its tensors, in the order of its leaves and buffers."""

    def __init__(self, call: Call) -> None:
        super().__init__()
        self.call = call
        self.names = [*call.leaves(), *call.buffers()]

    def forward(self, *tensors: Tensor) -> Any:
        return self.call.with_leaves(dict(zip(self.names, tensors, strict=True)))()


def _compiled(call: Call, with_gradients: bool, backend: Any) -> Results:
    with _compiler_state():
        return _run(call, with_gradients, backend, {}, {})


def _run(
    call: Call,
    with_gradients: bool,
    backend: Any,
    axes: dict[str, tuple[int, ...]],
    compiled: dict[str, Callable[..., Any]],
) -> Results:
    """Results through torch.compile; `compiled` keeps the compiled function from call to call."""

    def through_compile(fresh: Call) -> Any:
        for name, tensor in fresh.leaves().items():
            for axis in axes.get(name, ()):
                torch._dynamo.mark_dynamic(tensor, axis)
        if "function" not in compiled:
            compiled["function"] = torch.compile(fresh.function, fullgraph=True, backend=backend)
        return compiled["function"](**fresh.arguments)

    with use_backend("cpu"):
        if with_gradients:
            return differentiate(call, through_compile)
        with torch.no_grad():
            call = call.fresh()
            return Results(as_list(through_compile(call)), {}, call.buffers())


def _targets(graphs: Sequence[torch.fx.GraphModule]) -> list[str]:
    return [str(node.target) for graph in graphs for node in graph.graph.nodes if node.op == "call_function"]


def _operator_calls(call: Call) -> list[tuple[Any, tuple[Any, ...]]]:
    """The registered operators, with arguments, that one forward and backward calls on the CPU kernels."""
    found: list[tuple[Any, tuple[Any, ...]]] = []

    class Listen(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if str(func).startswith(_NAMESPACE):
                found.append((func, args))
            return func(*args, **(kwargs or {}))

    with use_backend("cpu"), Listen():  # type: ignore[no-untyped-call]
        differentiate(call)
    return found


@contextmanager
def _compiler_state() -> Iterator[None]:
    torch._dynamo.reset()
    try:
        yield
    finally:
        torch._dynamo.reset()
