"""Forward, gradients and gradients of gradients against fp64."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from fastvit_kernels import use_backend
from fastvit_kernels.testing.calls import Call, as_list, cotangents, differentiate
from fastvit_kernels.testing.contract.base import (
    ContractBase,
    check,
    expected,
    forward,
    on_cases,
    reference_results,
    run,
)
from fastvit_kernels.testing.inputs import FP32, FP64, LAYOUTS, Case, Precision
from fastvit_kernels.testing.numerics import assert_within_rule, relative_l2, to_fp64

_FP64_ROUNDING = 1e-13


class Numbers(ContractBase):
    """Results are the reference's, and the reference is the stated formula."""

    def test_reference_is_the_stated_formula(self, case: Case) -> None:
        call = case.call(FP64)
        found = forward(call, "reference").outputs
        wanted = as_list(type(self).equivalent(**call.fresh().arguments))
        assert [o.shape for o in found] == [o.shape for o in wanted]
        assert max(relative_l2(f, w) for f, w in zip(found, wanted, strict=True)) <= _FP64_ROUNDING

    @on_cases("smallest")
    def test_reference_gradients_are_the_derivatives(self, case: Case) -> None:
        """Against finite differences, first and second order."""
        function, leaves = _as_function(case.call(FP64))
        assert gradcheck(function, leaves, fast_mode=True)
        assert gradgradcheck(function, leaves, fast_mode=True)

    def test_forward(self, case: Case, backend: str, precision: Precision) -> None:
        exact, low = expected(case, precision)
        found = forward(case.call(precision), backend)
        check(found, exact, low)

    def test_gradients(self, case: Case, backend: str, precision: Precision) -> None:
        exact, low = expected(case, precision)
        check(run(case.call(precision), backend), exact, low, case.vanishing)

    @on_cases("smallest", "map")
    def test_layouts(self, case: Case, backend: str) -> None:
        """Every tensor of the call in every layout; the values are those of the layout's own tensors."""
        for name, layout in LAYOUTS.items():
            call = case.call(FP32)
            laid_out = {leaf: layout(t) for leaf, t in call.leaves().items() if not leaf.startswith("module.")}
            call = call.with_leaves(laid_out)
            assert name == "offset" or any(not t.is_contiguous() for t in call.leaves().values())
            exact, low = reference_results(call)
            check(run(call, backend), exact, low, case.vanishing)

    @on_cases("smallest")
    def test_output_gradients_in_any_layout(self, case: Case, backend: str) -> None:
        """Stride 0, as from `out.sum().backward()`; slices; transposed storage."""
        layouts = {"sum": lambda t: torch.ones((), dtype=t.dtype).expand(t.shape), **LAYOUTS}
        for layout in layouts.values():
            call = case.call(FP32)
            grads = partial(_laid_out_cotangents, layout)
            exact, low = reference_results(call, grads)
            with use_backend(backend):
                check(differentiate(call, grads=grads), exact, low, case.vanishing)

    @on_cases("smallest")
    def test_some_gradients_only(self, case: Case, backend: str) -> None:
        """A gradient does not depend on which others are asked for."""
        exact, low = expected(case, FP32)
        for name in case.call(FP32).leaves():
            call = case.call(FP32).fresh()
            leaf = call.leaves()[name].requires_grad_()
            with use_backend(backend):
                outputs = as_list(call())
            pairs = [(o, g) for o, g in zip(outputs, cotangents(outputs), strict=True) if o.requires_grad]
            (found,) = torch.autograd.grad([o for o, _ in pairs], [leaf], [g for _, g in pairs], allow_unused=True)
            check(low._replace(gradients={name: found}), exact, low, case.vanishing)

    @on_cases("smallest")
    def test_double_backward(self, case: Case, backend: str) -> None:
        with use_backend("reference"):
            exact, low = (_second_derivatives(case.call(FP32), fp64) for fp64 in (True, False))
        with use_backend(backend):
            found = _second_derivatives(case.call(FP32), False)
        assert found and found.keys() == exact.keys()
        for name in found.keys() - case.vanishing:
            assert_within_rule(found[name], (exact[name], low[name]), name=f"second derivative by {name}")


def _laid_out_cotangents(layout: Callable[[Tensor], Tensor], outputs: Sequence[Tensor]) -> list[Tensor]:
    return [layout(g) for g in cotangents(outputs)]


def _as_function(call: Call) -> tuple[Callable[..., tuple[Tensor, ...]], tuple[Tensor, ...]]:
    """The call as a function of its leaves, on the reference."""
    leaves = call.leaves()

    def function(*values: Tensor) -> tuple[Tensor, ...]:
        replaced = call.fresh().with_leaves(dict(zip(leaves, values, strict=True)))
        with use_backend("reference"):
            return tuple(as_list(replaced()))

    return function, tuple(t.detach().clone().requires_grad_() for t in leaves.values())


def _second_derivatives(call: Call, fp64: bool) -> dict[str, Tensor]:
    """Derivatives of a random combination of all first gradients, by the leaves and by the output gradients."""
    call = call.fresh()
    grads = cotangents(as_list(call.fresh()()))
    if fp64:
        call, grads = call.fp64(), to_fp64(grads)
    leaves = call.leaves()
    variables = [t.requires_grad_() for t in (*leaves.values(), *grads)]
    outputs = as_list(call())
    first = torch.autograd.grad(outputs, list(leaves.values()), grads, create_graph=True)
    weights = cotangents(first, seed=2)
    total = torch.stack([(f * w.to(f.dtype)).sum() for f, w in zip(first, weights, strict=True)]).sum()
    names = [*leaves, *(f"output gradient {index}" for index in range(len(grads)))]
    second = torch.autograd.grad(total, variables, allow_unused=True)
    return {name: gradient for name, gradient in zip(names, second, strict=True) if gradient is not None}
