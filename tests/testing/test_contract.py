"""The contract suite fails where it should: each check is shown an operator with a planted error."""

from __future__ import annotations

import threading
from contextlib import ExitStack, contextmanager, nullcontext
from unittest import mock

import pytest
import torch
import torch.nn.functional as F

from fastvit_kernels import ops
from fastvit_kernels.ops import dispatch, library
from fastvit_kernels.ops.arguments import check_tensor
from fastvit_kernels.ops.operator import BackwardBackend
from fastvit_kernels.testing import inputs
from fastvit_kernels.testing.contract import Contract, Rejection
from fastvit_kernels.testing.contract.base import expected
from fastvit_kernels.testing.inputs import BF16, FP32, tagged

OPERATOR = library.operators["pointwise_mlp"]
REFERENCE = OPERATOR.reference
PUBLIC = ops.pointwise_mlp.__globals__


def plain_pytorch(x, weight1, bias1, weight2, bias2, activation, norm_weight, norm_bias, norm_eps, residual):
    h = F.linear(F.layer_norm(x, x.shape[-1:], norm_weight, norm_bias, norm_eps), weight1, bias1)
    h = F.gelu(h) if activation == "gelu" else h * torch.sigmoid(1.702 * h)
    return residual + F.linear(h, weight2, bias2)


class Suite(Contract, Rejection):
    """The suite as an operator inherits it, its checks called by hand."""

    cases = tagged(inputs.POINTWISE_MLP, "smallest")
    fused = ("pointwise_mlp",)
    equivalent = staticmethod(plain_pytorch)
    reshaped = (
        [inputs.pointwise_mlp_case(f"{n} rows", leading=(n, 9)) for n in (2, 3)],
        {"x": (0, 1), "residual": (0, 1)},
    )


SUITE, CASE = Suite(), Suite.cases[0]
WIDE = inputs.pointwise_mlp_case("wide", leading=(64,), channels=80, hidden=328)


class Planted:
    """The CPU backend with an error: `change(outputs, tensors, static)` returns what it gives out instead."""

    name = "cpu"

    def __init__(self, change, supports, run_original):
        self.original = OPERATOR.backends[0]
        self.change = change or (lambda outputs, tensors, static: outputs)
        self.more_reasons = supports or (lambda tensors: [])
        self.run_original = run_original

    def supports(self, tensors, static):
        return self.original.supports(tensors, static) + self.more_reasons(tensors)

    def run(self, tensors, packed, static):
        outputs = self.original.run(tensors, packed, static) if self.run_original else None
        return self.change(outputs, tensors, static)


class PlantedBackward(Planted, BackwardBackend):
    """The CPU backend with an error in its gradients: `change(gradients, needs)`."""

    def __init__(self, change):
        super().__init__(None, None, True)
        self.change_gradients = change

    def supports_backward(self, grads, tensors, needs, static):
        return self.original.supports_backward(grads, tensors, needs, static)

    def run_backward(self, grads, tensors, needs, static):
        return self.change_gradients(self.original.run_backward(grads, tensors, needs, static), needs)


@contextmanager
def gradient_kernels(change):
    with mock.patch.object(OPERATOR, "backends", [PlantedBackward(change), *OPERATOR.backends[1:]]):
        yield


def _gradient_sums_by_thread(found, needs):
    return [g * (1 + 1e-6 * torch.get_num_threads()) for g in found]


def _forgets_without_its_neighbour(found, needs):
    return [g * 0 if needs[3] and not needs[0] else g for g in found]


@contextmanager
def backend(change=None, supports=None, run_original=True):
    planted = Planted(change, supports, run_original)
    with mock.patch.object(OPERATOR, "backends", [planted, *OPERATOR.backends[1:]]):
        yield


def _with_static(**changes):
    return lambda outputs, tensors, static: REFERENCE(tensors, static._replace(**changes))


def _tanh_gelu(outputs, tensors, static):
    with mock.patch.dict(REFERENCE.__globals__, activate=lambda x, name: F.gelu(x, approximate="tanh")):
        return REFERENCE(tensors, static)


def _sums_in_bf16(outputs, tensors, static):
    x, norm_weight, norm_bias, weight1, bias1, weight2, bias2, residual = tensors
    h = F.gelu(F.linear(F.layer_norm(x, x.shape[-1:], norm_weight, norm_bias, static.norm_eps), weight1, bias1))
    out = residual + bias2
    for k in range(h.shape[-1]):
        out = out + h[..., k : k + 1] * weight2[:, k]
    return (out,)


def _one_row_unwritten(outputs, tensors, static):
    found = torch.empty_like(outputs[0])
    found[:, :-1] = outputs[0][:, :-1]
    return (found,)


def _one_row_unwritten_by_the_second_thread(outputs, tensors, static):
    return outputs if torch.get_num_threads() == 1 else _one_row_unwritten(outputs, tensors, static)


def _one_nan(outputs, tensors, static):
    outputs[0][0, 0, 0] = float("nan")
    return outputs


def _writes_its_input(outputs, tensors, static):
    tensors[0].mul_(1 + 1e-6)
    return outputs


def _returns_its_input(outputs, tensors, static):
    return (tensors[7].copy_(outputs[0]),)


def _sums_by_thread(outputs, tensors, static):
    return (outputs[0] * (1 + 2e-7 * torch.get_num_threads()),)


_shared = {}


def _keeps_state(outputs, tensors, static):
    _shared["out"] = outputs[0]
    threading.Event().wait(0.001)
    return (_shared["out"].clone(),)


def _ignores_strides(outputs, tensors, static):
    dense = [None if t is None else torch.as_strided(t, t.shape, torch.empty(t.shape).stride()) for t in tensors]
    return REFERENCE(dense, static)


@contextmanager
def gradients(change):
    """A backend that has no kernels for the gradients, and the recomputed ones changed."""
    original = library.recompute_gradients

    def changed(*args, **kwargs):
        return change(original(*args, **kwargs))

    with backend(), mock.patch.object(library, "recompute_gradients", changed):
        yield


def _scaled_weight_gradient(found):
    return [*found[:3], None if found[3] is None else found[3] * 1.001, *found[4:]]


def _forgets_when_few_are_wanted(found):
    few = sum(g is not None for g in found) == 1
    return [None if g is None else g * 0 if few else g for g in found]


def _not_differentiable_again(found):
    return [None if g is None else g.detach() for g in found]


def _unwritten_gradient(found):
    return [None if g is None else torch.empty_like(g) if i == 4 else g for i, g in enumerate(found)]


_calls = iter(range(10**9))


def _not_repeatable(found):
    return [None if g is None else g * (1 + 1e-6 * next(_calls)) for g in found]


@contextmanager
def autocast_leaks():
    """`torch.autocast(..., enabled=False)` does nothing: the backward computes in the autocast around it."""
    real = torch.autocast

    def leaky(device, dtype=None, enabled=True, **options):
        return real(device, dtype, enabled, **options) if enabled else nullcontext()

    with backend(), mock.patch.object(torch, "autocast", leaky):
        yield


@contextmanager
def reference(change):
    """Another reference; what is remembered of the right one is left aside."""
    expected.cache_clear()
    with mock.patch.object(OPERATOR, "reference", change):
        yield
    expected.cache_clear()


@contextmanager
def _misreads_gradients():
    """A backward kernel that takes every output gradient for row-major."""
    original = library.recompute_gradients

    def misread(composition, grads, *args, **kwargs):
        read = [
            torch.as_strided(g, g.shape, torch.empty(g.shape).stride()) if g.stride()[-1] == 1 else g for g in grads
        ]
        return original(composition, read, *args, **kwargs)

    as_they_come = mock.patch.object(library, "row_major", list)
    with backend(), as_they_come, mock.patch.object(library, "recompute_gradients", misread):
        yield


def _wrong_fake(tensors, static):
    return (tensors[0].new_empty(tensors[0].shape, dtype=torch.bfloat16),)


def _breaks_the_graph(tensors):
    torch._dynamo.graph_break()
    return []


def _specializes(tensors):
    return ["never"] if tensors[0].shape[0] == 77 else [] if tensors[0].shape[0] == 2 else []


def _planted(what, plant, check, *arguments, message):
    plants = plant if isinstance(plant, tuple) else (plant,)
    return pytest.param(plants, check, arguments, message, id=what)


RULE = r"outside the numerics rule"
NOT_FINITE = r"NaN or infinite where the reference is finite"
BITS = r"result 0 differs between runs"


@pytest.mark.parametrize(
    ("plants", "check", "arguments", "message"),
    [
        _planted("epsilon", backend(_with_static(norm_eps=2e-5)), "test_forward", CASE, "cpu", FP32, message=RULE),
        _planted("tanh", backend(_tanh_gelu), "test_forward", CASE, "cpu", FP32, message=RULE),
        _planted(
            "other activation",
            backend(_with_static(activation="quick_gelu")),
            "test_gradients",
            CASE,
            "cpu",
            FP32,
            message=RULE,
        ),
        _planted(
            "fp32 that went through bf16",
            backend(lambda outputs, tensors, static: (outputs[0].bfloat16().float(),)),
            "test_forward",
            CASE,
            "cpu",
            FP32,
            message=RULE,
        ),
        _planted(
            "bf16 that was summed in bf16", backend(_sums_in_bf16), "test_forward", WIDE, "cpu", BF16, message=RULE
        ),
        _planted(
            "unwritten row",
            backend(_one_row_unwritten),
            "test_everything_is_written",
            CASE,
            "cpu",
            FP32,
            message=NOT_FINITE,
        ),
        _planted(
            "unwritten gradient",
            gradients(_unwritten_gradient),
            "test_gradients_are_written",
            CASE,
            "cpu",
            message=f"bias1.*{NOT_FINITE}",
        ),
        _planted("NaN", backend(_one_nan), "test_forward", CASE, "cpu", FP32, message=NOT_FINITE),
        _planted(
            "changed input",
            backend(_writes_its_input),
            "test_inputs_are_left_alone",
            CASE,
            "cpu",
            message="x was changed",
        ),
        _planted(
            "aliased input",
            backend(_returns_its_input),
            "test_outputs_are_fresh_and_dense",
            CASE,
            "cpu",
            message="shares an input's memory",
        ),
        _planted(
            "transposed output",
            backend(lambda outputs, tensors, static: (outputs[0].mT.contiguous().mT,)),
            "test_outputs_are_fresh_and_dense",
            CASE,
            "cpu",
            message="has strides",
        ),
        _planted(
            "ignored strides",
            (
                backend(_ignores_strides, run_original=False),
                mock.patch.object(library, "dense", lambda tensors, *rest: list(tensors)),
            ),
            "test_layouts",
            CASE,
            "cpu",
            message=f"{RULE}|{NOT_FINITE}",
        ),
        _planted(
            "scaled gradient",
            gradients(_scaled_weight_gradient),
            "test_gradients",
            CASE,
            "cpu",
            FP32,
            message=f"gradient of weight1: {RULE}",
        ),
        _planted(
            "gradient lost when alone",
            gradients(_forgets_when_few_are_wanted),
            "test_some_gradients_only",
            CASE,
            "cpu",
            message=f"gradient of x: {RULE}",
        ),
        _planted(
            "strided output gradient misread",
            _misreads_gradients(),
            "test_output_gradients_in_any_layout",
            CASE,
            "cpu",
            message=f"{RULE}|{NOT_FINITE}",
        ),
        _planted(
            "no second derivative",
            gradients(_not_differentiable_again),
            "test_double_backward",
            CASE,
            "cpu",
            message="does not require grad",
        ),
        _planted(
            "bits by thread count",
            backend(_sums_by_thread),
            "test_bits_do_not_depend_on_the_thread_count",
            CASE,
            FP32,
            "cpu",
            message=BITS,
        ),
        _planted(
            "row left out by the second thread",
            backend(_one_row_unwritten_by_the_second_thread),
            "test_bits_do_not_depend_on_the_thread_count",
            CASE,
            FP32,
            "cpu",
            message=BITS,
        ),
        _planted(
            "gradient bits by thread count",
            gradient_kernels(_gradient_sums_by_thread),
            "test_gradient_bits_do_not_depend_on_the_thread_count",
            CASE,
            FP32,
            "cpu",
            message=BITS,
        ),
        _planted(
            "gradients lost when x needs none",
            gradient_kernels(_forgets_without_its_neighbour),
            "test_some_gradients_only",
            CASE,
            "cpu",
            message=RULE,
        ),
        _planted(
            "gradients that do not repeat",
            gradients(_not_repeatable),
            "test_gradients_repeat_under_deterministic_algorithms",
            CASE,
            "cpu",
            message=BITS,
        ),
        _planted(
            "state shared by threads",
            backend(_keeps_state),
            "test_threads_do_not_disturb_each_other",
            CASE,
            "cpu",
            message=BITS,
        ),
        _planted(
            "autocast that narrows the residual",
            backend(lambda outputs, tensors, static: (outputs[0].to(static.dtype),)),
            "test_autocast",
            CASE,
            "cpu",
            message=r"got torch\.bfloat16, expected torch\.float32",
        ),
        _planted(
            "autocast inside the backward",
            autocast_leaks(),
            "test_backward_does_not_depend_on_the_autocast_around_it",
            CASE,
            "cpu",
            message="differs between runs",
        ),
        _planted(
            "reference with another epsilon",
            reference(lambda tensors, static: REFERENCE(tensors, static._replace(norm_eps=1e-6))),
            "test_reference_is_the_stated_formula",
            CASE,
            message=r"<= 1e-13",
        ),
        _planted(
            "reference with tanh",
            reference(lambda tensors, static: _tanh_gelu(None, tensors, static)),
            "test_reference_is_the_stated_formula",
            CASE,
            message=r"<= 1e-13",
        ),
        _planted(
            "reference that drops a gradient",
            reference(
                lambda tensors, static: REFERENCE([t.detach() if i == 4 else t for i, t in enumerate(tensors)], static)
            ),
            "test_reference_gradients_are_the_derivatives",
            CASE,
            message="Jacobian|not used in the graph|differentiated",
        ),
        _planted(
            "fake of another dtype",
            mock.patch.object(OPERATOR, "fake", _wrong_fake),
            "test_operator_registrations",
            CASE,
            "cpu",
            message="Dtypes torch.float32 and torch.bfloat16 are not equal",
        ),
        _planted(
            "graph break",
            backend(supports=_breaks_the_graph),
            "test_compiled_keeps_the_fused_operators",
            CASE,
            "cpu",
            message="graph_break",
        ),
        _planted(
            "graph without the operator",
            backend(lambda outputs, tensors, static: REFERENCE(tensors, static), run_original=False),
            "test_compiled_keeps_the_fused_operators",
            CASE,
            "cpu",
            message="pointwise_mlp is not in",
        ),
        _planted(
            "graph for one batch size",
            backend(supports=_specializes),
            "test_compiled_once_for_all_sizes",
            message="Recompil|recompil|specializ|Constraints violated",
        ),
        _planted(
            "graph deaf to use_backend",
            mock.patch.object(dispatch, "requested_backend", lambda backend=None: "cpu"),
            "test_compiled_notices_another_backend",
            message=r"assert \[True\] == \[True, False\]",
        ),
        _planted(
            "exported kernel",
            mock.patch.object(torch.compiler, "is_exporting", lambda: False),
            "test_exported_graph_is_plain_pytorch",
            CASE,
            message="fastvit.pointwise_mlp",
        ),
        _planted(
            "traced kernel",
            mock.patch.object(torch.jit, "is_tracing", lambda: False),
            "test_traced_graph_is_plain_pytorch",
            CASE,
            message="fastvit::pointwise_mlp|unsupported input list type",
        ),
        _planted(
            "unchecked parameter",
            mock.patch.dict(PUBLIC, check_parameter=lambda name, value, *rest, **options: value),
            "test_spoilt_tensors_are_named",
            CASE,
            message="accepted|expected",
        ),
        _planted(
            "unnamed argument",
            mock.patch.dict(PUBLIC, check_tensor=lambda name, *rest: check_tensor("argument", *rest)),
            "test_required_arguments_are_named",
            CASE,
            message="argument: expected",
        ),
    ],
)
def test_planted_error_is_caught(plants, check, arguments, message):
    with ExitStack() as stack:
        for plant in plants:
            stack.enter_context(plant)
        with pytest.raises(Exception, match=message):
            getattr(SUITE, check)(*arguments)
