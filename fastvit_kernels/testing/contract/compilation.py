"""torch.compile, torch.export, tracing and the operator registrations behind them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.testing import AotEagerAndRecordGraphs

from fastvit_kernels import use_backend
from fastvit_kernels.ops import library
from fastvit_kernels.testing.calls import Call, Results, as_list, differentiate
from fastvit_kernels.testing.contract.base import (
    NAMESPACE,
    ContractBase,
    backward_operators,
    forward,
    on_cases,
    operator_calls,
    run,
)
from fastvit_kernels.testing.inputs import FP32, Case
from fastvit_kernels.testing.numerics import relative_l2

# Relative L2: a generated kernel may sum in another order.
_INDUCTOR_ROUNDING = 1e-6
_OVERLOADS = {"cpu": "default", "triton": "triton", "sdpa": "sdpa"}


class Compilation(ContractBase):
    """Compiled, exported and traced programs compute what eager ones do."""

    @on_cases("smallest", "empty", "map")
    def test_compiled_keeps_the_fused_operators(self, case: Case, backend: str) -> None:
        """The whole call is one graph, with gradients and without, and the graph holds the operators themselves."""
        for with_gradients in (False, True):
            recorder = AotEagerAndRecordGraphs()
            call = case.call(FP32)
            found = _compiled(call, with_gradients, backend, compiler=recorder)
            _assert_equal(found, _eager(call, with_gradients, backend))
            targets = _targets(recorder.fw_graphs)
            for name in self.fused:
                found_forms = {f"{NAMESPACE}{form}.{_OVERLOADS[backend]}" for form in forms(name)} & set(targets)
                assert found_forms, f"{name} is not in {targets}"
            if with_gradients:
                backward = _targets(recorder.bw_graphs)
                # The same overloads as without the compiler: kernels where they can, else the recomputing one.
                assert {t for t in backward if "_backward." in t} == backward_operators(call, backend)
                assert all(any(t.startswith(f"{NAMESPACE}{name}_backward.") for t in backward) for name in self.fused)

    @on_cases("inductor")
    def test_compiled_by_inductor(self, case: Case) -> None:
        call = case.call(FP32)
        found, wanted = _compiled(call, True, compiler="inductor"), _eager(call, True)
        _assert_equal(found, wanted, _INDUCTOR_ROUNDING, case.vanishing)

    @on_cases("smallest")
    def test_compiled_with_every_number_dynamic(self, case: Case) -> None:
        """`dynamic=True` makes symbols of the Python numbers among the arguments, too."""
        call = case.call(FP32)
        _assert_equal(_compiled(call, True, compiler="aot_eager", dynamic=True), _eager(call, True))

    def test_compiled_once_for_all_sizes(self) -> None:
        cases, axes = self.reshaped
        calls = [case.call(FP32) for case in cases]
        # A module is one object in all calls: another one would be compiled again.
        calls = [replace(call, function=calls[0].function) for call in calls]
        for with_gradients in (False, True):
            wanted = [_eager(call, with_gradients) for call in calls]
            with _compiler_state(), torch._dynamo.config.patch(error_on_recompile=True), use_backend("cpu"):
                compiled = torch.compile(calls[0].function, fullgraph=True, backend="aot_eager")
                for call, eager in zip(calls, wanted, strict=True):
                    found = _run(call, with_gradients, partial(_call_resized, compiled, axes), fresh=False)
                    _assert_equal(found, eager)

    def test_compiled_notices_another_backend(self) -> None:
        case = next(c for c in self.cases if "smallest" in c.tags)
        call = case.call(FP32).fresh()
        recorder = AotEagerAndRecordGraphs()
        with _compiler_state(), torch.no_grad():
            compiled = torch.compile(call.function, fullgraph=True, backend=recorder)
            for backend in ("cpu", "reference", "cpu"):
                with use_backend(backend):
                    compiled(**call.arguments)
        fused = [any(t.startswith(NAMESPACE) for t in _targets([g])) for g in recorder.fw_graphs]
        assert fused == [True, False]

    @on_cases("smallest", "map")
    def test_exported_graph_is_plain_pytorch(self, case: Case) -> None:
        exportable = _Exportable(case.call(FP32).fresh())
        program = torch.export.export(exportable, exportable.examples())
        assert not [t for t in _targets([program.graph_module]) if t.startswith(NAMESPACE)]
        with torch.no_grad():
            outputs = as_list(program.module()(*exportable.examples()))
        _assert_equal(Results(outputs, {}, {}), forward(case.call(FP32), "reference"))

    @on_cases("smallest", "map")
    def test_traced_graph_is_plain_pytorch(self, case: Case) -> None:
        exportable = _Exportable(case.call(FP32).fresh())
        with warnings.catch_warnings(), torch.no_grad():
            # Sizes become constants of a traced graph (torch warns at each comparison), and tracing is deprecated.
            warnings.simplefilter("ignore")
            traced = torch.jit.trace(exportable, exportable.examples(), check_trace=False)
            outputs = as_list(traced(*exportable.examples()))
        assert not [n for n in traced.inlined_graph.nodes() if n.kind().startswith(f"{library.NAMESPACE}::")]
        _assert_equal(Results(outputs, {}, {}), forward(case.call(FP32), "reference"))

    @on_cases("smallest", "empty")
    def test_operator_registrations(self, case: Case, backend: str) -> None:
        """torch.library.opcheck on every registered operator the call runs, forward and backward."""
        calls = operator_calls(case.call(FP32), backend)
        names = {str(op).split(".")[1] for op, _ in calls}
        assert all(names & forms(name) for name in self.fused)
        for op, arguments in calls:
            torch.library.opcheck(op, arguments)


def forms(name: str) -> set[str]:
    """An operator's own, and those of its training: the second of two steps, or one that keeps something."""
    return {name, f"{name}_finish", f"{name}_keeping"}


class _Exportable(torch.nn.Module):
    """A call as a module of its arguments' tensors."""

    def __init__(self, call: Call) -> None:
        super().__init__()
        self.call = call
        self.module = call.function if isinstance(call.function, torch.nn.Module) else None
        self.tensors = {n: t for n, t in {**call.leaves(), **call.buffers()}.items() if not n.startswith("module.")}
        self.names = list(self.tensors)

    def examples(self) -> tuple[Tensor, ...]:
        return tuple(t.detach().clone() for t in self.tensors.values())

    def forward(self, *tensors: Tensor) -> Any:
        return self.call.with_leaves(dict(zip(self.names, tensors, strict=True)))()


def _compiled(call: Call, with_gradients: bool, backend: str = "cpu", *, compiler: Any, dynamic: Any = None) -> Results:
    def run(fresh: Call) -> Any:
        compiled = torch.compile(fresh.function, fullgraph=True, backend=compiler, dynamic=dynamic)
        return compiled(**fresh.arguments)

    with _compiler_state(), use_backend(backend):
        return _run(call, with_gradients, run)


def _eager(call: Call, with_gradients: bool, backend: str = "cpu") -> Results:
    return run(call, backend) if with_gradients else forward(call, backend)


def _assert_equal(found: Results, wanted: Results, rounding: float = 0.0, noise: Container[str] = ()) -> None:
    """Equal bits, or nearly so where a compiler reorders arithmetic; `noise` names gradients that hold nothing else."""
    gradients = [name for name in found.gradients if not (rounding and name in noise)]
    pairs = [
        *((f"output {i}", f, w) for i, (f, w) in enumerate(zip(found.outputs, wanted.outputs, strict=True))),
        *((f"gradient of {name}", found.gradients[name], wanted.gradients[name]) for name in gradients),
        *((name, found.buffers[name], wanted.buffers[name]) for name in found.buffers),
    ]
    for name, f, w in pairs:
        if f is None or w is None:
            assert f is w, f"{name}: there on one side only"
        else:
            assert (f.shape, f.dtype) == (w.shape, w.dtype), f"{name}: {f.shape} {f.dtype}, eager {w.shape} {w.dtype}"
            assert relative_l2(f, w) <= rounding, f"{name}: {relative_l2(f, w):.3e} from eager"


def _call_resized(compiled: Callable[..., Any], axes: dict[str, tuple[int, ...]], call: Call) -> Any:
    for name, tensor in call.leaves().items():
        for axis in axes.get(name, ()):
            torch._dynamo.mark_dynamic(tensor, axis)
    return compiled(**call.arguments)


def _run(call: Call, with_gradients: bool, run: Callable[[Call], Any], fresh: bool = True) -> Results:
    if with_gradients:
        return differentiate(call, run, fresh=fresh)
    with torch.no_grad():
        call = call.fresh() if fresh else call
        return Results(as_list(run(call)), {}, call.buffers())


def _targets(graphs: Sequence[torch.fx.GraphModule]) -> list[str]:
    return [str(node.target) for graph in graphs for node in graph.graph.nodes if node.op == "call_function"]


@contextmanager
def _compiler_state() -> Iterator[None]:
    torch._dynamo.reset()
    try:
        yield
    finally:
        torch._dynamo.reset()
