"""PyTorch's attention as a backend of both attention operators: when it runs, and what of the operators it keeps."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.testing import AotEagerAndRecordGraphs

from fastvit_kernels import BackendError, ops, use_backend
from fastvit_kernels.models import create_model
from fastvit_kernels.ops import attention, dispatch, library, preference, tuning
from fastvit_kernels.ops.attention import attend, sdpa_attend
from fastvit_kernels.ops.tuning import Preference, Tuning
from fastvit_kernels.testing import inputs, relative_l2
from fastvit_kernels.testing.calls import differentiate
from fastvit_kernels.testing.contract.base import backward_operators, operator_calls
from fastvit_kernels.testing.raw import raw_call

NAMES = ("global_attention", "local_attention")


def _call(name, precision=inputs.FP32):
    return inputs.tagged(inputs.CASES[name], "smallest")[0].call(precision)


@pytest.fixture
def on_gpu(monkeypatch):
    """A GPU, which this CPU then stands for; what it makes puts times of an operator in force."""
    monkeypatch.setattr(preference, "_DEVICE_TYPE", "cpu")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))

    def measured(operator, **times):
        entry = Preference(operator, "NVIDIA H200", "9.0", "float32", "forward", 16, times, "nvidia-h200.csv")
        return tuning.using(Tuning((), (entry,)))

    return measured


def _order(name):
    operator = library.operators[name]
    return [b.name for b in preference.in_order(operator, dispatch._Reference(operator), *raw_call(_call(name)))[0]]


def _chosen(name, backend=None):
    with dispatch.record(recorder := dispatch.Recorder()):
        call = _call(name)
        call.function(**call.arguments, **({} if backend is None else {"backend": backend}))
    return recorder.decisions[0]


@pytest.mark.parametrize("name", NAMES)
def test_unmeasured_it_stands_behind_the_reference(name, on_gpu):
    """Which can run anything: `auto` never comes to it."""
    with tuning.using(Tuning()):
        assert _order(name)[-2:] == ["reference", "sdpa"]
        assert _chosen(name).rejected["sdpa"] == ["cpu comes first"]
        call = _call(name).fp64()
        with dispatch.record(recorder := dispatch.Recorder()):
            call()
        assert recorder.decisions[0].chosen == "reference"
        assert recorder.decisions[0].rejected["sdpa"] == ["reference comes first"]


def test_rows_that_measured_it_decide(on_gpu):
    with on_gpu("global_attention", sdpa=1.0, triton=2.0, cpu=3.0, reference=4.0):
        assert _order("global_attention") == ["sdpa", "triton", "cpu", "reference"]
        decision = _chosen("global_attention")
        assert decision.chosen == "sdpa" and decision.measured.startswith("sdpa 1 ms, triton 2 ms, cpu 3 ms")
        assert decision.rejected["cpu"] == ["sdpa was measured faster"]
        assert _order("local_attention")[-1] == "sdpa"
        assert _chosen("global_attention", "cpu").chosen == "cpu"
    with on_gpu("global_attention", cpu=2.0, sdpa=3.0):
        assert _order("global_attention") == ["cpu", "sdpa", "triton", "reference"]
        assert _chosen("global_attention").rejected["sdpa"] == ["cpu was measured faster"]


def test_rows_without_it_leave_it_behind_the_reference(on_gpu):
    with on_gpu("local_attention", triton=1.0, reference=2.0):
        assert _order("local_attention") == ["triton", "reference", "cpu", "cuda", "sdpa"]
    with on_gpu("local_attention", triton=1.0, cuda=2.0):
        assert _order("local_attention") == ["triton", "cuda", "cpu", "reference", "sdpa"]


@pytest.mark.parametrize("name", NAMES)
def test_by_name_it_runs(name):
    with use_backend("sdpa"):
        assert _chosen(name).chosen == "sdpa"
        assert f"fastvit.{name}.sdpa" in {str(op) for op, _ in operator_calls(_call(name), "sdpa")}
    assert _chosen(name, "sdpa").chosen == "sdpa"


def test_other_operators_refuse_it_by_name():
    """As they refuse the CUDA kernels that they have not: nothing else runs silently."""
    x, weight = torch.ones(2, 4), torch.ones(4, 4)
    with pytest.raises(BackendError, match="pointwise_mlp has no sdpa kernels in this build"):
        ops.pointwise_mlp(x, weight, None, weight, None, activation="gelu", backend="sdpa")
    model = create_model("pvt_v2_b0", depths=(1, 1, 1, 1)).eval()
    with use_backend("sdpa"), torch.no_grad(), pytest.raises(BackendError, match="patch_embedding: backend 'sdpa'"):
        model(torch.zeros(1, 3, 32, 32))


def test_other_devices_are_a_reason():
    q = torch.zeros(1, 4, 8, device="meta")
    with pytest.raises(BackendError, match="sdpa: tensors are on meta, it is registered for cpu and cuda"):
        ops.global_attention(q, q, q, num_heads=1, scale=1.0, backend="sdpa")


@pytest.mark.parametrize("name", NAMES)
def test_gradients_come_from_it_where_they_are_within_the_rule(name):
    """The numbers are the contract suite's."""
    assert backward_operators(_call(name, inputs.BF16), "sdpa") == {f"fastvit.{name}_backward.sdpa"}
    assert backward_operators(_call(name), "sdpa") == {f"fastvit.{name}_backward.default"}


@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_registered(name):
    calls = operator_calls(_call(name, inputs.BF16), "sdpa")
    assert {str(op) for op, _ in calls} == {f"fastvit.{name}.sdpa", f"fastvit.{name}_backward.sdpa"}
    for op, arguments in calls:
        torch.library.opcheck(op, arguments)


@pytest.mark.parametrize("name", NAMES)
def test_compiled_gradients_are_the_same(name):
    call, recorder = _call(name, inputs.BF16), AotEagerAndRecordGraphs()
    torch._dynamo.reset()
    with use_backend("sdpa"):
        eager = differentiate(call)
        compiled = differentiate(
            call, lambda fresh: torch.compile(fresh.function, fullgraph=True, backend=recorder)(**fresh.arguments)
        )
    torch._dynamo.reset()
    targets = [str(node.target) for graph in recorder.bw_graphs for node in graph.graph.nodes]
    assert f"fastvit.{name}_backward.sdpa" in targets
    assert all(torch.equal(f, w) for f, w in zip(compiled.outputs, eager.outputs, strict=True))
    assert all(torch.equal(g, eager.gradients[n]) for n, g in compiled.gradients.items() if g is not None)


@pytest.mark.parametrize("name", NAMES)
def test_only_inputs_are_kept_for_the_gradients(name):
    call = _call(name, inputs.BF16).fresh()
    leaves = call.leaves()
    for leaf in leaves.values():
        leaf.requires_grad_()
    given, kept = {t.data_ptr() for t in leaves.values()}, []
    with use_backend("sdpa"), torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        call()
    assert kept and {t.data_ptr() for t in kept} <= given


def _heads(*batch, queries=5, keys=7, heads=3):
    generator = torch.Generator().manual_seed(0)
    shapes = [(*batch, heads, n, 8) for n in (queries, keys, keys)]
    return [torch.randn(shape, dtype=torch.float64, generator=generator) for shape in shapes]


@pytest.mark.parametrize("largest", [1, 4, 5, 100])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("biased", [False, True])
def test_batches_beyond_the_largest_come_in_parts(largest, masked, biased, monkeypatch):
    monkeypatch.setattr(attention, "_LARGEST_BATCH", largest)
    q, k, v = _heads(2, 3, 2)
    bias = torch.linspace(-2, 2, 3 * 5 * 7, dtype=torch.float64).view(3, 5, 7) if biased else None
    absent = (torch.arange(3 * 2 * 7) % 5 == 0).view(1, 3, 2, 1, 1, 7) if masked else None
    found, wanted = (function(q, k, v, bias, absent, -0.3) for function in (sdpa_attend, attend))
    assert found.shape == wanted.shape and relative_l2(found, wanted) < 1e-14


def test_nothing_is_attended_without_queries():
    for batch, queries in ((0, 5), (2, 0)):
        q, k, v = _heads(batch, queries=queries)
        assert sdpa_attend(q, k, v, None, None, 1.0).shape == (batch, 3, queries, 8)
