"""Which backend runs a call, who may choose it, and what a refused choice says."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from contextlib import ExitStack
from dataclasses import replace

import pytest
import torch

from fastvit_kernels import BackendError, _extension, explain, ops, use_backend
from fastvit_kernels.ops import dispatch, library, preference, tuning
from fastvit_kernels.ops.tuning import Preference, Tuning
from fastvit_kernels.testing import inputs
from fastvit_kernels.testing.raw import raw_call


def _call(dtype=torch.float32, device="cpu"):
    x = torch.ones(2, 4, dtype=dtype, device=device)
    weight = torch.ones(4, 4, dtype=dtype, device=device)
    return lambda **options: ops.pointwise_mlp(x, weight, None, weight, None, activation="gelu", **options)


def _decision(call, **options):
    recorder = dispatch.Recorder()
    with dispatch.record(recorder):
        call(**options)
    (decision,) = recorder.decisions
    return decision


def test_the_cpu_kernels_are_loaded():
    """The other tests ask for them by name; this one says why they could not be found."""
    assert _extension.parts["cpu"].loaded, _extension.parts["cpu"].problem


@pytest.mark.parametrize("name", inputs.CASES)
def test_every_operator_runs_on_the_cpu_kernels_by_itself(name):
    call = inputs.tagged(inputs.CASES[name], "smallest")[0].call()
    decision = _decision(lambda: call())
    assert (decision.operator, decision.chosen) == (name, "cpu")
    assert "reference" in decision.rejected


def test_order_and_reasons_of_the_default():
    decision = _decision(_call())
    assert decision.chosen == "cpu"
    assert decision.shape == "(2, 4) float32 cpu"
    assert any("asked for by name" in reason for reason in decision.rejected["triton"])
    assert decision.rejected["reference"] == ["cpu comes first"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_falls_back_where_the_cpu_kernels_cannot(dtype):
    decision = _decision(_call(dtype))
    assert decision.chosen == "reference"
    assert any(str(dtype).removeprefix("torch.") in reason for reason in decision.rejected["cpu"])


def test_meta_tensors_have_shapes():
    with torch.autocast("cpu", torch.bfloat16):
        assert _call(device="meta")().shape == (2, 4)
    assert _decision(_call(device="meta")).chosen == "reference"


def test_a_choice_goes_before_the_block_before_the_environment(monkeypatch):
    monkeypatch.setattr(dispatch, "_environment", "reference")
    assert _decision(_call()).chosen == "reference"
    with use_backend("cpu"):
        assert _decision(_call()).chosen == "cpu"
        assert _decision(_call(), backend="reference").chosen == "reference"
        with use_backend("auto"):
            assert _decision(_call(torch.float64)).chosen == "reference"
    assert _decision(_call()).chosen == "reference"


def test_a_block_ends_with_an_error_too():
    with pytest.raises(ZeroDivisionError), use_backend("reference"):
        raise ZeroDivisionError
    assert dispatch.requested_backend() == dispatch._environment


def test_a_block_belongs_to_its_thread():
    inside, seen = threading.Event(), []

    def other():
        inside.wait()
        seen.append(dispatch.requested_backend())
        with use_backend("cpu"):
            seen.append(dispatch.requested_backend())

    thread = threading.Thread(target=other)
    thread.start()
    with use_backend("reference"):
        inside.set()
        thread.join()
        assert dispatch.requested_backend() == "reference"
    assert seen == [dispatch._environment, "cpu"]


def test_a_recorder_belongs_to_its_thread():
    recorder = dispatch.Recorder()
    with dispatch.record(recorder):
        thread = threading.Thread(target=_call())
        thread.start()
        thread.join()
    assert not recorder.decisions


@pytest.mark.parametrize("choose", [lambda name: use_backend(name).__enter__(), lambda name: _call()(backend=name)])
def test_an_unknown_name_is_refused(choose):
    with pytest.raises(ValueError, match=r"backend.*: unknown backend 'gpu', expected one of auto, cuda, triton, cpu"):
        choose("gpu")


def test_an_explicit_choice_that_cannot_run_says_everything():
    with pytest.raises(BackendError) as caught:
        _call(torch.float64)(backend="cpu")
    lines = str(caught.value).splitlines()
    assert lines[0] == "pointwise_mlp: backend 'cpu' cannot run this call on (2, 4) float64 cpu"
    assert lines[1] == "  cpu: float64: the CPU kernels take float32 and bfloat16"
    assert lines[2].startswith("  triton: ")
    assert lines[3] == "  reference: could run it"


def test_a_backend_without_kernels_is_no_silent_fallback():
    with pytest.raises(BackendError, match="pointwise_mlp has no cuda kernels in this build"):
        _call()(backend="cuda")


@pytest.fixture
def measured(monkeypatch):
    """Entries of a device, which this CPU then stands for; a function that puts them in force."""
    monkeypatch.setattr(preference, "_DEVICE_TYPE", "cpu")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    with ExitStack() as stack:
        yield lambda *entries: stack.enter_context(tuning.using(Tuning((), entries)))


def _entry(**changes):
    times = {"cpu": 2.0, "triton": 3.0, "cuda": 1.0, "reference": 4.0}
    entry = Preference("pointwise_mlp", "NVIDIA H200", "9.0", "float32", "forward", 8, times, "nvidia-h200.csv")
    return replace(entry, **changes)


def _order(operator="local_attention"):
    """Which backends a call of the operator would be offered, most preferred first."""
    tensors, static = raw_call(inputs.tagged(inputs.CASES[operator], "smallest")[0].call())
    return [backend.name for backend in preference.in_order(library.operators[operator], _FALLBACK, tensors, static)[0]]


_FALLBACK = dispatch._Reference(library.operators["local_attention"])


def test_what_was_never_measured_comes_behind_triton(measured):
    assert tuning.read(tuning.PACKAGE_FILE) == Tuning()
    measured()
    assert _order() == ["cpu", "triton", "cuda", "reference", "sdpa"]


@pytest.mark.parametrize(
    ("changes", "first"),
    [
        ({"operator": "local_attention"}, "cuda"),
        ({"operator": "local_attention", "capability": "8.0"}, "cpu"),
        ({"operator": "local_attention", "dtype": "bfloat16"}, "cpu"),
        ({"operator": "local_attention", "mode": "training"}, "cpu"),
        ({}, "cpu"),
    ],
)
def test_a_measurement_decides_for_its_operator_dtype_mode_and_gpu(measured, changes, first):
    measured(_entry(channels=16, **changes))
    order = _order()
    assert order[0] == first and sorted(order) == ["cpu", "cuda", "reference", "sdpa", "triton"]
    if first == "cuda":
        assert order == ["cuda", "cpu", "triton", "reference", "sdpa"]


def test_the_nearest_width_decides(measured):
    wide = _entry(channels=192, milliseconds={"reference": 1.0, "cpu": 2.0})
    measured(_entry(channels=64), wide)
    widths = (32, 64, 110, 111, 192, 384)
    found = [tuning.current().preference("pointwise_mlp", "9.0", "float32", "forward", n) for n in widths]
    assert [entry.channels for entry in found] == [64, 64, 64, 192, 192, 192]


def test_a_width_that_is_far_from_all_measured_ones_has_no_times(measured):
    measured(_entry(channels=64), _entry(channels=320))
    for channels in (0, 1, 31, 129, 159, 641, 9999):
        assert tuning.current().preference("pointwise_mlp", "9.0", "float32", "forward", channels) is None
    assert _decision(_call()).measured == ""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_each_dtype_has_times_of_its_own(measured, dtype):
    measured(
        _entry(dtype="bfloat16", milliseconds={"reference": 1.0, "cpu": 2.0}),
        _entry(dtype="float16", milliseconds={"reference": 2.0, "cpu": 1.0}),
    )
    found = preference._measured("pointwise_mlp", torch.device("cpu"), dtype, False, 8)[0]
    by_dtype = {torch.bfloat16: ("reference", "cpu"), torch.float16: ("cpu", "reference"), torch.float32: ()}
    assert found == by_dtype[dtype]


def test_the_order_and_its_text_are_made_once(measured):
    measured(_entry())
    arguments = "pointwise_mlp", torch.device("cpu"), torch.float32, False, 4
    first, second = preference._measured(*arguments), preference._measured(*arguments)
    assert first[0] == ("cuda", "cpu", "triton", "reference") and first[1].startswith("cuda 1 ms, ")
    assert first[0] is second[0] and first[1] is second[1]


def test_a_measured_reference_goes_before_kernels(measured):
    measured(_entry(milliseconds={"cpu": 2.0, "reference": 1.0}), _entry(mode="training"))
    decision = _decision(_call())
    assert decision.chosen == "reference" and decision.rejected["cpu"] == ["reference was measured faster"]
    # By name a backend runs as before, and with a gradient other times count.
    assert _decision(_call(), backend="cpu").chosen == "cpu"
    x = torch.ones(2, 4, requires_grad=True)
    call = inputs.tagged(inputs.POINTWISE_MLP, "smallest")[0].call()
    trained = call.with_leaves({"x": call.arguments["x"].requires_grad_()})
    assert x.requires_grad and _decision(lambda: trained()).chosen == "cpu"
    with torch.no_grad():
        assert _decision(lambda: trained()).chosen == "reference"


def test_explain_shows_the_times_that_decided(measured):
    class Model(torch.nn.Module):
        def forward(self, x):
            return ops.pointwise_mlp(x, torch.ones(4, 4), None, torch.ones(4, 4), None, activation="gelu")

    measured(_entry())
    explanation = explain(Model(), torch.ones(2, 4))
    (decision,) = explanation.decisions
    assert decision.chosen == "cpu" and decision.channels == 4
    times = "cuda 1 ms, cpu 2 ms, triton 3 ms, reference 4 ms"
    assert decision.measured == f"{times} (NVIDIA H200, float32, 8 channels, forward; nvidia-h200.csv)"
    assert f"measured: {times}" in str(explanation)
    assert decision.rejected["reference"] == ["cpu was measured faster"]


def test_a_measurement_decides_in_a_compiled_graph(measured):
    measured(_entry(milliseconds={"cpu": 2.0, "reference": 1.0}))
    graphs = []

    def backend(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    weight = torch.ones(4, 4)
    torch.compiler.reset()
    compiled = torch.compile(
        lambda x: ops.pointwise_mlp(x, weight, None, weight, None, activation="gelu"), fullgraph=True, backend=backend
    )
    compiled(torch.ones(2, 4))
    (graph,) = graphs
    assert not any("fastvit" in str(node.target) for node in graph.graph.nodes)
    torch.compiler.reset()


def test_the_cuda_kernels_are_no_choice_on_a_cpu():
    call = inputs.tagged(inputs.LOCAL_ATTENTION, "smallest")[0].call()
    decision = _decision(call)
    assert decision.chosen == "cpu" and "tensors are on cpu" in decision.rejected["cuda"]
    with pytest.raises(BackendError, match="cuda: .*tensors are on cpu"):
        call.function(**call.arguments, backend="cuda")


def test_kernels_that_were_not_built_are_a_reason(monkeypatch):
    monkeypatch.setitem(_extension.parts, "cpu", _extension.Part("cpu", None, "not built: for this test"))
    assert _decision(_call()).rejected["cpu"] == ["not built: for this test"]
    with pytest.raises(BackendError, match="cpu: not built: for this test"):
        _call()(backend="cpu")


def test_transforms_of_torch_func_and_forward_mode_see_plain_pytorch():
    call = inputs.tagged(inputs.POINTWISE_MLP, "smallest")[0].call()
    x, residual = call.arguments.pop("x"), call.arguments.pop("residual")

    def function(x):
        return call.function(x, **call.arguments, residual=torch.zeros_like(x)).square().sum()

    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(function(leaf), leaf)
    derivative = pytest.approx(float((gradient * residual).sum()), rel=1e-4)
    assert float((torch.func.grad(function)(x) * residual).sum()) == derivative
    assert float(torch.func.jvp(function, (x,), (residual,))[1]) == derivative
    assert float(torch.func.vmap(function)(x).sum()) == pytest.approx(float(function(x)), rel=1e-5)
    with torch.autograd.forward_ad.dual_level():
        dual = function(torch.autograd.forward_ad.make_dual(x, residual))
        assert float(torch.autograd.forward_ad.unpack_dual(dual).tangent) == derivative


def _python(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True, timeout=120
    )


def test_the_environment_chooses():
    code = "from fastvit_kernels.ops.dispatch import requested_backend; print(requested_backend())"
    assert _python(code, FASTVIT_BACKEND="reference").stdout.strip() == "reference"


def test_an_unknown_name_in_the_environment_is_refused():
    """At its first use: the package can still be imported, and the command line says what is wrong in one line."""
    message = "FASTVIT_BACKEND: unknown backend 'fast', expected one of auto"
    code = """
import sys
import fastvit_kernels
from fastvit_kernels import cli
try:
    fastvit_kernels.ops.dispatch.requested_backend()
except ValueError as error:
    print(error)
sys.exit(cli.main(['info']))
"""
    result = _python(code, FASTVIT_BACKEND="fast")
    assert result.stdout.startswith(message)
    assert result.returncode == 2 and result.stderr.startswith(f"fastvit-kernels: {message}")
    assert "Traceback" not in result.stderr
