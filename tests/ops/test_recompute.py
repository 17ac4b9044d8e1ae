"""Memory against time in training: who keeps what for the backward, and who may choose."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import Tensor

import fastvit_kernels
from fastvit_kernels import use_backend, use_recompute
from fastvit_kernels.bench import step_memory
from fastvit_kernels.nn import PointwiseMLP
from fastvit_kernels.ops import dispatch
from fastvit_kernels.ops.library import operators
from fastvit_kernels.ops.pointwise_mlp import native


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
                assert decision.recomputed == ["it is Sunday"]
            else:
                assert decision.rejected["cpu"] == ["recompute is off: it is Sunday"] and not decision.recomputed
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


def test_backends_without_any_gradients_are_concerned() -> None:
    (cuda,) = (backend for backend in operators["depthwise_mlp"].backends if backend.name == "cuda")
    assert dispatch.gradient_reasons(cuda, [], [], [], None) == ["no kernels for gradients"]


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
