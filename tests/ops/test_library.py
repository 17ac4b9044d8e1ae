"""The registered operators themselves: what they refuse, and that autograd, modes and checkpoints go through them."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from fastvit_kernels import ops
from fastvit_kernels.ops import library
from fastvit_kernels.testing import inputs
from fastvit_kernels.testing.calls import as_list, cotangents, differentiate
from fastvit_kernels.testing.contract.base import ContractBase
from fastvit_kernels.testing.raw import raw_call

OPERATORS = tuple(inputs.CASES)


def _case(name):
    return inputs.tagged(inputs.CASES[name], "smallest")[0]


def _op(name, suffix=""):
    return getattr(torch.ops.fastvit, f"{name}{suffix}").default


def _backwards(name):
    """The recomputing backward and the overloads with kernels."""
    packet = getattr(torch.ops.fastvit, f"{name}_backward")
    return [getattr(packet, overload) for overload in packet.overloads()]


def _supported(overload, grads, tensors, needs, static):
    if overload._overloadname == "default":
        return True
    wanted = {"native": "cpu", "triton": "triton", "sdpa": "sdpa"}[overload._overloadname]
    operator = library.operators[overload._schema.name.split("::")[1].removesuffix("_backward")]
    backend = next(b for b in operator.backends if b.name == wanted)
    return not backend.supports_backward(grads, tensors, needs, static)


def _backward_arguments(name, case, precision):
    """What a backward that wants every gradient gets."""
    tensors, static = raw_call(case.call(precision))
    grads = cotangents(as_list(_op(name)(tensors, None, *static)))
    return grads, tensors, [t is not None for t in tensors], static


@pytest.mark.parametrize("name", OPERATORS)
def test_registered_kernels(name):
    def has(operator, key):
        return torch._C._dispatch_has_kernel_for_dispatch_key(f"fastvit::{operator}", key)

    for operator in (name, f"{name}_pack", f"{name}_backward"):
        assert has(operator, "CPU") and has(operator, "Meta"), operator
    assert has(f"{name}_backward", "CUDA")
    for overload in _backwards(name)[1:]:
        full = f"{name}_backward.{overload._overloadname}"
        assert has(full, "CPU") and has(full, "Meta"), full


@pytest.mark.parametrize("name", OPERATORS)
def test_fakes_have_the_shapes_strides_and_dtypes_of_the_kernels(name):
    for case in inputs.CASES[name]:
        for precision in (inputs.FP32, inputs.BF16, inputs.BF16_FP32):
            tensors, static = raw_call(case.call(precision))
            on_meta = [None if t is None else t.to("meta") for t in tensors]
            found = as_list(_op(name)(tensors, None, *static))
            fake = as_list(_op(name)(on_meta, None, *static))
            for a, b in zip(found, fake, strict=True):
                assert (a.shape, a.stride(), a.dtype) == (b.shape, b.stride(), b.dtype), case.name


@pytest.mark.parametrize("name", OPERATORS)
def test_gradients_are_fresh_and_as_their_fakes(name):
    cases = [(c, p) for c in inputs.CASES[name] for p in (inputs.FP32, inputs.BF16, inputs.BF16_FP32)]
    for case, precision in cases:
        grads, tensors, needs, static = _backward_arguments(name, case, precision)
        on_meta = [None if t is None else t.to("meta") for t in tensors]
        for overload in _backwards(name):
            slow = overload._overloadname == "triton" and "smallest" not in case.tags
            if slow or not _supported(overload, grads, tensors, needs, static):
                continue
            found = overload(grads, tensors, needs, *static)
            fake = overload([g.to("meta") for g in grads], on_meta, needs, *static)
            for a, b in zip(found, fake, strict=True):
                assert (a.shape, a.stride(), a.dtype) == (b.shape, b.stride(), b.dtype), (overload, case.name)
            own, given = _storages(found), _storages([*grads, *tensors])
            assert len(set(own)) == len(own) and not set(own) & set(given), f"{overload}, {case.name}: shared memory"


def _storages(tensors):
    return [t.untyped_storage().data_ptr() for t in tensors if t is not None and t.numel()]


@pytest.mark.parametrize("name", OPERATORS)
def test_backward_operators(name):
    """Each is a lawful operator, whichever backend would be chosen."""
    grads, tensors, needs, static = _backward_arguments(name, _case(name), inputs.FP32)
    overloads = [o for o in _backwards(name) if _supported(o, grads, tensors, needs, static)]
    for overload in overloads:
        torch.library.opcheck(overload, (grads, tensors, needs, *static))


@pytest.mark.parametrize("name", OPERATORS)
def test_raw_backward_refuses_what_would_read_out_of_bounds(name):
    grads, tensors, needs, static = _backward_arguments(name, _case(name), inputs.FP32)
    wrong = [(grads, tensors[:-1], needs), (grads[:-1], tensors, needs), ([*grads, grads[0]], tensors, needs)]
    wrong += [(grads, tensors, needs[:-1]), (grads, tensors, [*needs, True]), (grads, [None, *tensors[1:]], needs)]
    for index, t in enumerate(tensors):
        for other in _spoilt(t) if t is not None else []:
            wrong.append((grads, [*tensors[:index], other, *tensors[index + 1 :]], needs))
    for index, g in enumerate(grads):
        for other in _spoilt(g) if g.numel() else []:
            wrong.append(([*grads[:index], other, *grads[index + 1 :]], tensors, needs))
    native = [o for o in _backwards(name) if o._overloadname == "native"]
    default = next(o for o in _backwards(name) if o._overloadname == "default")
    for overload in native:
        for bad in wrong:
            try:
                found = overload(*bad, *static)
            except (RuntimeError, ValueError, NotImplementedError):
                continue
            # What it takes must make sense.
            for a, b in zip(found, default(*bad, *static), strict=True):
                torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    with pytest.raises((RuntimeError, ValueError)):
        default(grads, tensors, needs[:-1], *static)


def _spoilt(t):
    others = [t[:0], t[..., :-1].contiguous(), t[None], t.flatten(), t.new_zeros(()), t.double(), t.long(), t.bool()]
    return [*others, t.to(torch.complex64), t.to(torch.int8), t.to("meta"), t[..., None].expand(*t.shape, 2)[..., 0]]


def _strided_cotangents(outputs):
    return [g.mT.contiguous().mT for g in cotangents(outputs)]


@pytest.mark.parametrize("reasons", [[], ["another time"]])
@pytest.mark.parametrize("compiled", [False, True])
def test_a_backend_brings_its_own_backward(reasons, compiled):
    """It is asked with row-major gradients, and passed by when it says why not."""
    operator = library.operators["pointwise_mlp"]
    asked = []

    class Trained(type(operator.backends[0])):
        def supports_backward(self, grads, tensors, needs, static):
            if not torch.compiler.is_compiling():
                asked.append(([g.is_contiguous() and not g.is_neg() for g in grads], len(tensors), list(needs)))
            return reasons

        def run_backward(self, grads, tensors, needs, static):
            found = torch.ops.fastvit.pointwise_mlp_backward.default(list(grads), list(tensors), needs, *static)
            return [2 * g for g in found]

    call = _case("pointwise_mlp").call()
    del call.arguments["norm_weight"]
    wanted = differentiate(call).gradients
    with mock.patch.object(operator, "backends", [Trained(), *operator.backends[1:]]):
        run = torch.compile(call.function, fullgraph=True, backend="aot_eager") if compiled else call.function
        found = differentiate(
            call,
            lambda c: run(**c.arguments),
            lambda o: [torch._neg_view(-g.mT.contiguous()).mT for g in cotangents(o)],
        )
    # The residual's gradient is the output's own.
    needs = [True, False, True, True, True, True, True, False]
    assert asked == ([] if compiled else [([True], 8, needs)])
    for key, gradient in found.gradients.items():
        factor = 1 if reasons or key == "residual" else 2
        torch.testing.assert_close(gradient, wanted[key] * factor, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", OPERATORS)
def test_packing_operator(name):
    tensors, static = raw_call(_case(name).call())
    packed = _op(name, "_pack")(tensors, *static)
    assert packed.dtype == torch.uint8 and packed.ndim == 1
    torch.library.opcheck(_op(name, "_pack"), (tensors, *static), test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("name", OPERATORS)
def test_raw_operator_refuses_what_would_read_out_of_bounds(name):
    """Callers of torch.ops pass the public function's checks by: an error, never a crash."""
    tensors, static = raw_call(_case(name).call())
    op = _op(name)
    wrong = [tensors[:-1], [*tensors, None], [None, *tensors[1:]]]
    for index, t in enumerate(tensors):
        if t is None:
            continue
        others = [t[:0], t[..., :-1].contiguous(), t[None], t.flatten(), t.new_zeros(()), t.double(), t.long()]
        others += [t.to(torch.complex64), t[..., None].expand(*t.shape, 2)[..., 0]]
        wrong += [[*tensors[:index], other, *tensors[index + 1 :]] for other in others]
    for bad in wrong:
        try:
            found = as_list(op(bad, None, *static))
        except (RuntimeError, NotImplementedError):
            continue
        # What it takes must be a call that makes sense: the reference takes it too, with the same result.
        wanted = library.operators[name].reference(bad, static)
        for a, b in zip(found, wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", OPERATORS)
def test_raw_operator_refuses_arguments_out_of_range(name):
    tensors, static = raw_call(_case(name).call())
    for field, value in static._asdict().items():
        for bad in _out_of_range(field, value):
            with pytest.raises(RuntimeError):
                _op(name)(tensors, None, *static._replace(**{field: bad}))


def _out_of_range(field, value):
    if field in ("norm_eps", "bn_eps", "scale"):
        return []
    if isinstance(value, torch.dtype):
        return [torch.float64, torch.float16, torch.int32]
    if isinstance(value, list):
        return [value[:-1], [-1] * len(value), [10**6] * len(value)] if field == "padding" else [value[:-1], [0, 0, 0]]
    if isinstance(value, bool):
        return []
    if isinstance(value, int):
        return [-1, value + 10**6] if field in ("padding", "num_prefix_tokens") else [0, -1]
    return ["unknown"]


def test_own_residual():
    """x as its own residual gets the sum of both gradients, compiled or not."""
    call = _case("pointwise_mlp").call(inputs.FP64)
    del call.arguments["residual"], call.arguments["x"]
    x = torch.randn(2, 9, 16, dtype=torch.float64)

    def function(x, arguments):
        return ops.pointwise_mlp(x, **arguments, residual=x).square().sum()

    (wanted,) = torch.autograd.grad(function(leaf := x.clone().requires_grad_(), call.arguments), leaf)
    low = call.map(lambda t: t.float())
    for run in (function, torch.compile(function, fullgraph=True, backend="aot_eager")):
        (found,) = torch.autograd.grad(run(leaf := x.float().requires_grad_(), low.arguments), leaf)
        torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", OPERATORS)
def test_autograd_under_a_dispatch_mode(name):
    """A mode (here one that counts FLOPs) takes over below autograd; the recomputing backward needs its own."""

    def run(call):
        with FlopCounterMode(display=False):
            return differentiate(call)

    ContractBase().hold(_case(name), inputs.FP32, run)


@pytest.mark.parametrize("name", OPERATORS)
def test_checkpoint(name):
    def run(call):
        names, values = zip(*call.leaves().items(), strict=True)

        def function(*values):
            return call.with_leaves(dict(zip(names, values, strict=True)))()

        return checkpoint(function, *values, use_reentrant=False)

    ContractBase().hold(_case(name), inputs.FP32, lambda call: differentiate(call, run))


def test_a_second_backward_needs_retained_buffers():
    call = _case("pointwise_mlp").call()
    call.leaves()["x"].requires_grad_()
    out = call()
    out.sum().backward(retain_graph=True)
    out.sum().backward()
    with pytest.raises(RuntimeError, match="second time"):
        out.sum().backward()


def test_a_changed_input_is_noticed_by_backward():
    call = _case("pointwise_mlp").call()
    call.leaves()["x"].requires_grad_()
    out = call()
    call.leaves()["weight1"].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_outputs_need_no_gradient_without_a_reason():
    call = _case("pointwise_mlp").call()
    assert not call().requires_grad
    call.leaves()["x"].requires_grad_()
    with torch.no_grad():
        assert not call().requires_grad
    with torch.inference_mode():
        assert call().is_inference()
    assert call().requires_grad
