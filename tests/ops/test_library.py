"""The registered operators themselves: what they refuse, and that autograd, modes and checkpoints go through them."""

from __future__ import annotations

import pytest
import torch
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from fastvit_kernels import ops
from fastvit_kernels.ops import library
from fastvit_kernels.testing import inputs
from fastvit_kernels.testing.calls import as_list, differentiate
from fastvit_kernels.testing.contract.base import check, expected
from fastvit_kernels.testing.raw import raw_call

OPERATORS = tuple(inputs.CASES)


def _case(name):
    return inputs.tagged(inputs.CASES[name], "smallest")[0]


def _op(name, suffix=""):
    return getattr(torch.ops.fastvit, f"{name}{suffix}").default


@pytest.mark.parametrize("name", OPERATORS)
def test_registered_kernels(name):
    def has(operator, key):
        return torch._C._dispatch_has_kernel_for_dispatch_key(f"fastvit::{operator}", key)

    for operator in (name, f"{name}_pack", f"{name}_backward"):
        assert has(operator, "CPU") and has(operator, "Meta"), operator
    assert has(f"{name}_backward", "CUDA")


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
    case = _case(name)
    exact, low = expected(case, inputs.FP32)
    with FlopCounterMode(display=False):
        check(differentiate(case.call()), exact, low)


@pytest.mark.parametrize("name", OPERATORS)
def test_checkpoint(name):
    case = _case(name)
    exact, low = expected(case, inputs.FP32)

    def run(call):
        names, values = zip(*call.leaves().items(), strict=True)

        def function(*values):
            return call.with_leaves(dict(zip(names, values, strict=True)))()

        return checkpoint(function, *values, use_reentrant=False)

    check(differentiate(case.call(), run), exact, low)


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
