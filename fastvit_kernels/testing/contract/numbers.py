"""Forward, gradients and gradients of gradients against fp64."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck

from fastvit_kernels import use_backend
from fastvit_kernels.testing.calls import Call, Results, as_list, cotangents
from fastvit_kernels.testing.contract.base import ContractBase, check, expected, forward, on_cases, pooled, run
from fastvit_kernels.testing.inputs import (
    BF16,
    BF16_FP32,
    DENSE_LAYOUTS,
    FP16,
    FP32,
    FP64,
    LAYOUTS,
    Case,
    Precision,
)
from fastvit_kernels.testing.numerics import relative_l2, to_fp64

_FP64_ROUNDING = 1e-13
# In units of the dtype's eps: a few roundings of every intermediate; gradients of a peaked softmax lose two digits.
_OUTPUT_ERROR = 8.0
_GRADIENT_ERROR = 200.0


class Numbers(ContractBase):
    """Results are the reference's, and the reference is the stated formula."""

    def test_reference_is_the_stated_formula(self, case: Case) -> None:
        call = case.call(FP64)
        found = forward(call, "reference").outputs
        module = [call.fresh().function] if isinstance(call.function, nn.Module) else []
        wanted = as_list(type(self).equivalent(*module, **call.fresh().arguments))
        assert [o.shape for o in found] == [o.shape for o in wanted]
        assert max(relative_l2(f, w) for f, w in zip(found, wanted, strict=True)) <= _FP64_ROUNDING

    def test_reference_is_a_fair_yardstick(self, case: Case) -> None:
        """In every dtype it is near fp64; otherwise the rule would allow anything."""
        for precision in (FP32, BF16, BF16_FP32, FP16):
            eps = torch.finfo(precision.activations).eps
            exact, low = expected(case, precision)
            for found, wanted in zip(low.outputs, exact.outputs, strict=True):
                assert relative_l2(found, wanted) <= _OUTPUT_ERROR * eps
            for name in low.gradients.keys() - case.vanishing:
                gradient, wanted_gradient = low.gradients[name], exact.gradients[name]
                assert (gradient is None) == (wanted_gradient is None), name
                if gradient is not None and wanted_gradient is not None:
                    assert relative_l2(gradient, wanted_gradient) <= _GRADIENT_ERROR * eps, name

    @on_cases("smallest")
    def test_reference_gradients_are_the_derivatives(self, case: Case) -> None:
        """Against finite differences, first and second order."""
        function, leaves = _as_function(case.call(FP64))
        assert gradcheck(function, leaves, fast_mode=True)
        assert gradgradcheck(function, leaves, fast_mode=True)

    def test_forward(self, case: Case, backend: str, precision: Precision) -> None:
        self.hold(case, precision, partial(forward, backend=backend))

    def test_gradients(self, case: Case, backend: str, precision: Precision) -> None:
        self.hold(case, precision, partial(run, backend=backend))

    @on_cases("smallest", "map")
    def test_layouts(self, case: Case, backend: str) -> None:
        """Every argument in every layout; the values are those of the layout's own tensors."""
        for layout in LAYOUTS.values():
            self.hold(case, FP32, partial(run, backend=backend), change=partial(_laid_out, layout))

    @on_cases("smallest")
    def test_output_gradients_in_any_layout(self, case: Case, backend: str) -> None:
        """Stride 0, as from `out.sum().backward()`; slices; transposed storage; a sign that is only noted."""
        layouts = {"sum": lambda t: torch.ones((), dtype=t.dtype).expand(t.shape), **LAYOUTS}
        for layout in layouts.values():
            grads = partial(_laid_out_cotangents, layout)
            self.hold(case, FP32, partial(run, backend=backend, grads=grads), grads=grads)

    @on_cases("smallest")
    def test_some_gradients_only(self, case: Case, backend: str) -> None:
        """A gradient does not depend on which others are asked for: one alone, every other one, no parameter's."""
        names = list(case.call(FP32).leaves())
        activations = {name for name in names if not _is_parameter(name)}
        singles = names[:: 4 if backend in self.small_only else 1]
        for wanted in [*({name} for name in singles), names[::2], names[1::2], activations]:
            if wanted:
                self.hold(case, FP32, partial(_some_gradients, wanted, backend))

    @on_cases("smallest")
    def test_double_backward(self, case: Case, backend: str) -> None:
        results: dict[str, list[Results]] = {"found": [], "exact": [], "low": []}
        for seed in range(self.draws):
            call = case.call(FP32, seed)
            results["found"].append(_second_derivatives(call, backend))
            results["exact"].append(_second_derivatives(call, "reference", fp64=True))
            results["low"].append(_second_derivatives(call, "reference"))
        found, exact, low = (pooled(draws) for draws in results.values())
        assert found.gradients and found.gradients.keys() == exact.gradients.keys()
        check(found, exact, low, case.vanishing)


def _laid_out(layout: Callable[[Tensor], Tensor], call: Call) -> Call:
    arguments = {name: layout(t) for name, t in call.leaves().items() if not name.startswith("module.")}
    dense = [LAYOUTS[name] for name in DENSE_LAYOUTS]
    assert layout in dense or any(not t.is_contiguous() for t in arguments.values())
    return call.with_leaves(arguments)


def _is_parameter(leaf: str) -> bool:
    return leaf.startswith("module.") or "weight" in leaf or "bias" in leaf


def _some_gradients(wanted: Collection[str], backend: str, call: Call) -> Results:
    call = call.fresh()
    leaves = call.leaves()
    for name, leaf in leaves.items():
        leaf.requires_grad_(name in wanted)
    with use_backend(backend):
        outputs = as_list(call())
    # An output that depends on none of the leaves has no history.
    pairs = [(o, g) for o, g in zip(outputs, cotangents(outputs), strict=True) if o.requires_grad]
    names = [name for name in leaves if name in wanted]
    found = torch.autograd.grad(
        [o for o, _ in pairs], [leaves[name] for name in names], [g for _, g in pairs], allow_unused=True
    )
    return Results([o.detach() for o in outputs], dict(zip(names, found, strict=True)), {})


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


def _second_derivatives(call: Call, backend: str, fp64: bool = False) -> Results:
    """Derivatives of a random combination of all first gradients, by the leaves and by the output gradients."""
    call = call.fresh()
    with use_backend(backend):
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
    return Results([], {name: g for name, g in zip(names, second, strict=True) if g is not None}, {})
