"""Several operator calls as one node of autograd's graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain as joined
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastvit_kernels.nn.calls import Calls, Name, Step
from fastvit_kernels.nn.program import function_of
from fastvit_kernels.ops import library
from fastvit_kernels.ops.operator import Backend, Operator, Outputs, Tensors

_Values = dict[Any, Any]
# Gradients of a view's, a split's or a concatenation's inputs from those of its results, None for zeros.
Rule = Callable[[list["Tensor | None"]], list[Tensor]]


class Plain(NamedTuple):
    """A call that nobody differentiates."""

    step: Step


class Shape(NamedTuple):
    """A call that only moves values: its gradients move back."""

    step: Step
    rule: Rule
    inputs: list[Name]

    @property
    def results(self) -> list[Name]:
        return [r for r in self.step.results if r is not None]


class Fused(NamedTuple):
    """A call of an operator whose gradients are wanted.

    Attributes:
        tensors: its tensors; those of which gradients read no values are in `shapes`, too.
        step: what makes its outputs, and what it keeps.
        kept: what gradients read besides the tensors.
        shapes: by position, tensors of the shape and dtype of what gradients do not read.
        absent: gradients of outputs for which there are none, where these are empty; of others their shapes.
    """

    operator: Operator
    backend: Backend
    static: Any
    tensors: list[Name | None]
    step: Step
    outputs: list[Name]
    kept: list[Name]
    shapes: dict[int, Tensor]
    absent: list[Tensor]

    @property
    def inputs(self) -> list[Name]:
        return [name for name in self.tensors if name is not None]

    @property
    def results(self) -> list[Name]:
        return self.outputs

    @property
    def read_by_gradients(self) -> list[Name]:
        read = [name for index, name in enumerate(self.tensors) if name is not None and index not in self.shapes]
        return [*read, *self.kept]

    def reference(self, values: _Values) -> Outputs:
        return self.operator.reference([None if n is None else values[n] for n in self.tensors], self.static)


Link = Plain | Shape | Fused


class _Turn:
    """A call that gradients go through.

    Attributes:
        results, names: the variables of its results and of its tensors.
        wanted: for which of its tensors gradients are.
        spent: what nobody reads behind it.
    """

    def __init__(self, link: Shape | Fused, wanted: list[bool], spent: list[Name]) -> None:
        self.link, self.wanted, self.spent = link, wanted, spent
        self.results = link.results
        self.names: list[Name | None] = link.tensors if isinstance(link, Fused) else [*link.inputs]
        self._plan: library.GradientPlan | None = None

    def gradients(self, given: list[Tensor | None], values: _Values) -> Sequence[Tensor | None]:
        """One entry for each of the tensors, of which `values` has those that are read."""
        link = self.link
        if isinstance(link, Shape):
            return link.rule(given)
        shapes, static = link.shapes, link.static
        tensors = [
            shapes[index] if index in shapes else None if name is None else values[name]
            for index, name in enumerate(link.tensors)
        ]
        grads = [
            (none if none.numel() == 0 else torch.zeros_like(none)) if g is None else g
            for g, none in zip(given, link.absent, strict=True)
        ]
        grads = library.row_major(grads)
        plan = self._plan
        if plan is None:
            at = link.operator.residual
            residual_is_x = at is not None and link.tensors[at] == link.tensors[0]
            plan = library.plan_gradients(
                link.operator, link.backend, grads, tensors, self.wanted, static, residual_is_x
            )
            self._plan = plan
        return library.gradients(link.operator, plan, grads, tensors, static, [values[name] for name in link.kept])


class _Found(NamedTuple):
    """What a chain has computed: what is handed on, and what its gradients read.

    Attributes:
        guarded: for autograd to keep.
        own: variables that nobody else has.
    """

    outputs: list[Tensor]
    guarded: list[Tensor]
    own: _Values


class Chain:
    """Neighbouring calls of a recording, and their gradients.

    Args:
        links: the calls in order.
        inputs: the variables that come from outside and may have a gradient.
        bound: what all others that come from outside stand for.
        outputs: the variables that are handed on.
    """

    def __init__(self, links: list[Link], inputs: list[Name], bound: dict[str, Any], outputs: list[Name]) -> None:
        self.inputs, self.outputs = inputs, outputs
        self._differentiable = [link for link in links if not isinstance(link, Plain)]
        fused = [link for link in self._differentiable if isinstance(link, Fused)]
        read = dict.fromkeys(joined.from_iterable(link.read_by_gradients for link in fused))
        # Of inputs the values are there anyway; a gradient of the gradient starts from all of them.
        unread = {name for link in fused for name in link.inputs if name not in read}
        saved = [*read, *(name for name in inputs if name not in read and name not in unread)]
        # Autograd guards what others have, too; the rest goes as soon as no gradient needs it any more.
        known = {*inputs, *bound, *outputs}
        self._guarded = [name for name in saved if name in known]
        self._own = [name for name in saved if name not in known]
        made = {name for link in self._differentiable for name in link.results}
        self.constant = [index for index, name in enumerate(outputs) if name not in made]
        results = [*outputs, *self._guarded, *self._own]
        self._run = function_of(Calls([link.step for link in links], inputs, bound, results))
        self._plans: dict[tuple[bool, ...], list[_Turn]] = {}

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """The outputs, with the gradients' history."""
        found: tuple[Tensor, ...] = _Chained.apply(self, *inputs)  # type: ignore[no-untyped-call]
        return found

    def run(self, inputs: Sequence[Tensor]) -> _Found:
        """Makes the calls."""
        found = self._run(*inputs)
        first, second = len(self.outputs), len(self.outputs) + len(self._guarded)
        return _Found(found[:first], found[first:second], dict(zip(self._own, found[second:], strict=True)))

    def values(self, guarded: Sequence[Tensor], own: _Values) -> _Values:
        """The variables that gradients read."""
        return own | dict(zip(self._guarded, guarded, strict=True))

    def gradients(
        self, grads: Sequence[Tensor | None], values: _Values, needs: tuple[bool, ...]
    ) -> list[Tensor | None]:
        """One entry for each of the inputs, None where none is wanted. Uses up the values."""
        totals = _Totals()
        for output, grad in zip(self.outputs, grads, strict=True):
            if grad is not None:
                totals.add(output, grad, own=False)
        for turn in self._plan(needs):
            of_results = [totals.take(name) for name in turn.results]
            if all(g is None for g in of_results):
                continue
            found = turn.gradients(of_results, values)
            fresh = isinstance(turn.link, Fused)
            for name, grad in zip(turn.names, found, strict=True):
                if grad is not None:
                    totals.add(name, grad, own=fresh and grad is not of_results[0])
            for variable in turn.spent:
                values.pop(variable, None)
            grad = None
            del of_results, found
        return [totals.take(name) if n else None for name, n in zip(self.inputs, needs, strict=True)]

    def differentiable_gradients(
        self, grads: Sequence[Tensor | None], values: _Values, needs: tuple[bool, ...]
    ) -> list[Tensor | None]:
        """The same through the operators' references, so that they can be differentiated again."""
        asked = [index for index, grad in enumerate(grads) if grad is not None]

        def reference(inputs: Tensors, _: Any) -> Outputs:
            here = values | dict(zip(self.inputs, inputs, strict=True))
            for link in self._differentiable:
                if isinstance(link, Fused):
                    here.update(zip(link.outputs, link.reference(here), strict=True))
                else:
                    here.update(zip(link.step.results, _call(link.step, here), strict=True))
            return tuple(here[self.outputs[index]] for index in asked)

        wanted = [grads[index] for index in asked]
        inputs = [values.get(name) for name in self.inputs]
        return library.recompute_gradients(reference, wanted, inputs, needs, None, create_graph=True)  # type: ignore[arg-type]

    def _plan(self, needs: tuple[bool, ...]) -> list[_Turn]:
        """The calls that gradients go through, the last first."""
        plan = self._plans.get(needs)
        if plan is None:
            wanted = {name for name, n in zip(self.inputs, needs, strict=True) if n}
            plan, seen = [], set[Name]()
            for link in self._differentiable:
                asked = [name in wanted for name in (link.tensors if isinstance(link, Fused) else link.inputs)]
                if any(asked):
                    wanted.update(link.results)
                    read = link.read_by_gradients if isinstance(link, Fused) else []
                    plan.insert(0, _Turn(link, asked, [name for name in read if name not in seen]))
                    seen.update(read)
            self._plans[needs] = plan
        return plan


class _Totals:
    """Gradients of variables, added up in the order in which they come."""

    def __init__(self) -> None:
        self._found: dict[Name | None, tuple[Tensor, bool]] = {}

    def add(self, name: Name | None, grad: Tensor, own: bool) -> None:
        """`own`: nobody else reads it."""
        before = self._found.get(name)
        if before is None:
            self._found[name] = grad, own
        elif before[1]:
            before[0].add_(grad)
        elif own:
            self._found[name] = grad.add_(before[0]), True
        else:
            self._found[name] = before[0] + grad, True

    def take(self, name: Name) -> Tensor | None:
        found = self._found.pop(name, None)
        return None if found is None else found[0]


_keeps_graph: Callable[[], bool] = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True)


class _Chained(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, chain: Chain, *inputs: Tensor) -> tuple[Tensor, ...]:
        found = chain.run(inputs)
        ctx.save_for_backward(*found.guarded)
        ctx.chain, ctx.own = chain, found.own
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*(found.outputs[index] for index in chain.constant))
        return tuple(found.outputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        chain, needs = ctx.chain, tuple(ctx.needs_input_grad[1:])
        if all(grad is None for grad in grads):
            return (None,) * (1 + len(needs))
        # Behind a first backward that was not told to keep the graph, this raises.
        guarded = ctx.saved_tensors
        values = chain.values(guarded, ctx.own)
        if not torch.is_grad_enabled() and not _keeps_graph():
            ctx.own = None
        compute = chain.differentiable_gradients if torch.is_grad_enabled() else chain.gradients
        return None, *compute(grads, values, needs)


def _call(step: Step, values: _Values) -> list[Any]:
    def filled(template: Any) -> Any:
        if isinstance(template, Name):
            return values[template]
        return [filled(t) for t in template] if isinstance(template, list) else template

    found = step.function(*map(filled, step.args), **{k: filled(v) for k, v in step.kwargs.items()})
    return list(found) if step.is_tuple else [found]
