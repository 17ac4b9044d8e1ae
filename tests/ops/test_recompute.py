"""Memory against time in training: who keeps what for the backward, and who may choose."""

from __future__ import annotations

import threading
from unittest import mock

import pytest
import torch
from torch import Tensor

import fastvit_kernels
from fastvit_kernels import use_backend, use_recompute
from fastvit_kernels.bench import step_memory
from fastvit_kernels.nn import PointwiseMLP
from fastvit_kernels.ops import dispatch, triton_support
from fastvit_kernels.ops.library import operators
from fastvit_kernels.ops.operator import BackwardBackend, Operator, Outputs, Tensors
from fastvit_kernels.ops.pointwise_mlp import native
from fastvit_kernels.testing import inputs
from fastvit_kernels.testing.calls import Results, differentiate
from fastvit_kernels.testing.raw import raw_call


@pytest.fixture(autouse=True)
def usual_choice():
    """Whatever FASTVIT_BACKEND says."""
    with use_backend("auto"):
        yield


@pytest.fixture
def no_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU kernels of pointwise_mlp have no gradients."""
    monkeypatch.setattr(native.Cpu, "supports_backward", lambda *arguments: ["it is Sunday"])


def _mlp() -> tuple[PointwiseMLP, Tensor]:
    torch.manual_seed(0)
    return PointwiseMLP(8, 32), torch.randn(2, 20, 8)


def _decision(mlp: PointwiseMLP, x: Tensor, **options: object) -> dispatch.Decision:
    (decision,) = fastvit_kernels.explain(mlp, x, **options).decisions
    return decision


def test_kernels_for_gradients_keep_their_inputs_whatever_is_chosen() -> None:
    mlp, x = _mlp()
    for enabled in (True, False):
        with use_recompute(enabled):
            decision = _decision(mlp, x, training=True)
            assert (decision.chosen, decision.gradients) == ("cpu", "cpu")
            assert step_memory.saved(lambda: mlp(x), mlp.parameters()) == x.nbytes


def test_without_recomputing_the_reference_keeps_its_graph(no_gradients: None) -> None:
    mlp, x = _mlp()
    kept = {}
    gradients = {}
    for enabled in (True, False):
        with use_recompute(enabled):
            decision = _decision(mlp, x, training=True)
            assert decision.chosen == ("cpu" if enabled else "reference") and decision.gradients == "reference"
            if enabled:
                assert decision.gradients_rejected == ["it is Sunday"]
            else:
                assert (
                    decision.rejected["cpu"] == ["recompute is off: it is Sunday"] and not decision.gradients_rejected
                )
            kept[enabled] = step_memory.saved(lambda: mlp(x), mlp.parameters())
            gradients[enabled] = torch.autograd.grad(mlp(x).square().sum(), list(mlp.parameters()))
    # At least the hidden rows in front of the activation and behind it.
    assert kept[True] == x.nbytes and kept[False] >= x.nbytes * (1 + 2 * 4)
    torch.testing.assert_close(gradients[True], gradients[False], rtol=1e-4, atol=1e-5)


def test_only_what_is_to_be_trained_is_concerned(no_gradients: None) -> None:
    mlp, x = _mlp()
    with use_recompute(False):
        assert _decision(mlp, x).chosen == "cpu"
        with use_backend("cpu"):
            assert _decision(mlp, x, training=True).chosen == "cpu"
        mlp.requires_grad_(False)
        recorder = dispatch.Recorder()
        with dispatch.record(recorder):
            assert not mlp(x).requires_grad
    assert [decision.chosen for decision in recorder.decisions] == ["cpu"]


class OnThisMachine:
    """The CUDA C++ kernels of an operator as dispatch sees them, computing through the reference."""

    name = "cuda"

    def __init__(self, operator: Operator) -> None:
        self.operator = operator

    def supports(self, tensors: Tensors, static: object) -> list[str]:
        return []

    def run(self, tensors: Tensors, packed: Tensor | None, static: object) -> Outputs:
        return self.operator.reference(tensors, static)


@pytest.fixture(params=["conv_projection", "depthwise_mlp", "local_attention"])
def cuda(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Operator:
    """An operator whose CUDA C++ kernels run on this CPU, and its Triton kernels in the interpreter."""
    operator = operators[request.param]
    kinds = {type(backend).__name__: backend for backend in operator.backends}
    assert kinds["Cuda"].name == "cuda" and not isinstance(kinds["Cuda"], BackwardBackend)
    monkeypatch.setattr(operator, "backends", [kinds["Triton"], OnThisMachine(operator)])
    return operator


def _train(operator: Operator) -> tuple[Results, dispatch.Decision]:
    recorder = dispatch.Recorder()
    case = inputs.tagged(inputs.CASES[operator.name], "smallest")[0]
    with dispatch.record(recorder), use_backend("cuda"):
        found = differentiate(case.call())
    (decision,) = recorder.decisions
    return found, decision


def test_triton_computes_the_gradients_of_the_cuda_kernels(cuda: Operator) -> None:
    with mock.patch.object(triton_support, "submit", side_effect=triton_support.submit) as submit:
        found, decision = _train(cuda)
    assert (decision.chosen, decision.gradients) == ("cuda", "triton") and submit.call_count > 0
    assert decision.gradients_rejected == ["no kernels for gradients"]
    with use_backend("reference"):
        expected = differentiate(inputs.tagged(inputs.CASES[cuda.name], "smallest")[0].call())
    assert found.gradients.keys() == expected.gradients.keys() and found.gradients
    for name, gradient in found.gradients.items():
        torch.testing.assert_close(gradient, expected.gradients[name], rtol=1e-3, atol=1e-4)


def test_the_reference_does_where_triton_cannot(cuda: Operator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(cuda.backends[0]), "supports_backward", lambda *arguments: ["it is Sunday"])
    _, decision = _train(cuda)
    assert (decision.chosen, decision.gradients) == ("cuda", "reference")
    assert decision.gradients_rejected == ["no kernels for gradients", "triton: it is Sunday"]


def test_cuda_kernels_recompute_only_where_triton_cannot_help(cuda: Operator, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors, static = raw_call(inputs.tagged(inputs.CASES[cuda.name], "smallest")[0].call())
    tensors = [None if t is None else t.requires_grad_() for t in tensors]
    assert dispatch._recomputed(cuda.backends[1], cuda, tensors, static) == []
    monkeypatch.setattr(type(cuda.backends[0]), "supports", lambda *arguments: ["it is Sunday"])
    reasons = ["no kernels for gradients", "triton: it is Sunday"]
    assert dispatch._recomputed(cuda.backends[1], cuda, tensors, static) == reasons


def test_a_block_belongs_to_its_thread_and_ends_with_an_error_too() -> None:
    seen = []
    with pytest.raises(ZeroDivisionError), use_recompute(False):
        thread = threading.Thread(target=lambda: seen.append(dispatch._state.recompute))
        thread.start()
        thread.join()
        assert dispatch._state.recompute is False
        _ = 1 / 0
    assert seen == [None] and dispatch._state.recompute is None


def test_a_compiled_graph_follows_the_choice(no_gradients: None) -> None:
    mlp, x = _mlp()
    ran = []

    def backend(graph, example):
        ran.append(str(graph.graph))
        return graph

    compiled = torch.compile(mlp, fullgraph=True, backend=backend)
    outputs = []
    for enabled in (True, False):
        with use_recompute(enabled):
            outputs.append(compiled(x))
    assert len(ran) == 2
    torch.testing.assert_close(*outputs)
