"""Several operator calls as one node of autograd's graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain as joined
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastvit_kernels.nn.calls import Calls, Name, Step, names_in
from fastvit_kernels.nn.program import function_of
from fastvit_kernels.ops import library
from fastvit_kernels.ops.operator import Backend, GradientKernels, Operator, Outputs, Tensors

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
        begun: what the kernels for batch statistics found.
        shapes: by position, tensors of the shape and dtype of what gradients do not read.
        absent: gradients to take for outputs that have none, where these are empty.
        kept: stands for what the gradients read besides the tensors.
    """

    operator: Operator
    backend: Backend
    static: Any
    tensors: list[Name | None]
    begun: list[Name]
    outputs: list[Name]
    kept: Name
    shapes: dict[int, Tensor]
    absent: list[Tensor]

    @property
    def inputs(self) -> list[Name]:
        return [name for name in self.tensors if name is not None]

    @property
    def results(self) -> list[Name]:
        return self.outputs

    @property
    def reads_outputs(self) -> bool:
        """Whether outputs are among what is kept."""
        return isinstance(self.backend, GradientKernels) and self.backend.reads_outputs(self.static)

    @property
    def read_by_gradients(self) -> list[Name]:
        return [name for index, name in enumerate(self.tensors) if name is not None and index not in self.shapes]

    @property
    def step(self) -> Step:
        return Step(self._run, [self.tensors, self.begun], {}, [*self.outputs, self.kept], True)

    def gradients(self, grads: Sequence[Tensor | None], values: _Values, needs: list[bool]) -> list[Tensor | None]:
        """One entry for each of the tensors, of which `values` has those that gradients read."""
        tensors = [
            self.shapes[index] if index in self.shapes else None if name is None else values[name]
            for index, name in enumerate(self.tensors)
        ]
        complete = [
            (none if none.numel() == 0 else torch.zeros_like(none)) if g is None else g
            for g, none in zip(grads, self.absent, strict=True)
        ]
        at = self.operator.residual
        return library.gradients(
            self.operator,
            self.backend,
            complete,
            tensors,
            needs,
            self.static,
            None,
            values[self.kept],
            at is not None and self.tensors[at] == self.tensors[0],
        )

    def reference(self, values: _Values) -> Outputs:
        return self.operator.reference([None if n is None else values[n] for n in self.tensors], self.static)

    def _run(self, tensors: Tensors, begun: Sequence[Tensor]) -> tuple[Any, ...]:
        outputs, kept = library.run_keeping(self.backend, tensors, tuple(begun), self.static)
        return *outputs, kept


Link = Plain | Shape | Fused


class _Turn(NamedTuple):
    """A call that gradients go through, for which of its tensors they are wanted, and what nobody reads behind it."""

    link: Shape | Fused
    results: list[Name]
    names: list[Name | None]
    wanted: list[bool]
    spent: list[Name]


class _Found(NamedTuple):
    """What a chain has computed: what is handed on, and what its gradients read.

    Attributes:
        guarded: for autograd to keep; at the end what operators keep besides their tensors, `counts` of each.
        own: variables that nobody else has.
    """

    outputs: list[Tensor]
    guarded: list[Tensor]
    counts: list[int]
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
        handed_on = [link for link in fused if link.reads_outputs and not known.isdisjoint(link.outputs)]
        self._guarded_kept = [link.kept for link in handed_on]
        self._own_kept = [link.kept for link in fused if link not in handed_on]
        made = {name for link in self._differentiable for name in link.results}
        self.constant = [index for index, name in enumerate(outputs) if name not in made]
        results = [*outputs, *self._guarded, *self._guarded_kept, *self._own, *self._own_kept]
        self._run = function_of(Calls([link.step for link in links], inputs, bound, results))
        self._plans: dict[tuple[bool, ...], list[_Turn]] = {}

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """The outputs, with the gradients' history."""
        found: tuple[Tensor, ...] = _Chained.apply(self, *inputs)  # type: ignore[no-untyped-call]
        return found

    def run(self, inputs: Sequence[Tensor]) -> _Found:
        """Makes the calls."""
        found = iter(self._run(*inputs))
        outputs = list(islice(found, len(self.outputs)))
        guarded = list(islice(found, len(self._guarded)))
        kept = list(islice(found, len(self._guarded_kept)))
        guarded += joined.from_iterable(kept)
        own = dict(zip([*self._own, *self._own_kept], found, strict=True))
        return _Found(outputs, guarded, [len(k) for k in kept], own)

    def values(self, guarded: Sequence[Tensor], counts: Sequence[int], own: _Values) -> _Values:
        """The variables that gradients read."""
        rest = iter(guarded)
        found = own | dict(zip(self._guarded, rest, strict=False))
        found.update((name, tuple(islice(rest, n))) for name, n in zip(self._guarded_kept, counts, strict=True))
        return found

    def gradients(
        self, grads: Sequence[Tensor | None], values: _Values, needs: tuple[bool, ...]
    ) -> list[Tensor | None]:
        """One entry for each of the inputs, None where none is wanted. Uses up the values."""
        totals = _Totals()
        for name, grad in zip(self.outputs, grads, strict=True):
            if grad is not None:
                totals.add(name, grad, own=False)
        for link, results, names, wanted, spent in self._plan(needs):
            of_results = [totals.take(name) for name in results]
            if all(g is None for g in of_results):
                continue
            if isinstance(link, Shape):
                for name, view in zip(names, link.rule(of_results), strict=True):
                    totals.add(name, view, own=False)
                continue
            found = link.gradients(of_results, values, wanted)
            for name, grad in zip(names, found, strict=True):
                if grad is not None:
                    totals.add(name, grad, own=grad is not of_results[0])
            for variable in spent:
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
                names: list[Name | None] = link.tensors if isinstance(link, Fused) else [*link.inputs]
                asked = [name in wanted for name in names]
                if any(asked):
                    wanted.update(link.results)
                    read = [*link.read_by_gradients, link.kept] if isinstance(link, Fused) else []
                    plan.insert(0, _Turn(link, link.results, names, asked, [n for n in read if n not in seen]))
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


_keeps_graph: Callable[[], bool] = getattr(
    torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True
)


class _Chained(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, chain: Chain, *inputs: Tensor) -> tuple[Tensor, ...]:
        found = chain.run(inputs)
        ctx.save_for_backward(*found.guarded)
        ctx.chain, ctx.counts, ctx.own = chain, found.counts, found.own
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
        values = chain.values(guarded, ctx.counts, ctx.own)
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


def inputs_of(link: Link) -> list[Name]:
    """The variables that a call reads."""
    return names_in(link.step.args) if isinstance(link, (Plain, Shape)) else [*link.inputs, *link.begun]
