"""Recording the calls behind a module's forward in training, as a function that makes them in few nodes of a graph."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.weak import WeakTensorKeyDictionary

from fastvit_kernels.nn.calls import Calls, Name, Step, names_in
from fastvit_kernels.nn.chain import Chain, Fused, Link, Plain, Shape
from fastvit_kernels.nn.program import function_of
from fastvit_kernels.nn.shapes import rule_of
from fastvit_kernels.ops import library, listening
from fastvit_kernels.ops.operator import Backend, Operator, Outputs, Tensors

_DEPENDS_ON_VALUES = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)
# With fewer of them a chain saves nothing.
_LEAST_FUSED = 2


class _Alone(NamedTuple):
    """A call that autograd records by itself."""

    step: Step


_Item = Link | _Alone
# Operator, arguments, result.
_Call = tuple[Any, tuple[Any, ...], Any]


class Tape(TorchDispatchMode):
    """Collects every operator call of the thread while it is active, and which of them autograd records.

    What makes a call unrepeatable is kept in `obstacle`: a value that Python looked at, a tensor of unknown origin, a
    write to an input or a parameter, one behind autograd's back.

    Args:
        inputs: the tensors that the function will take, in this order.
        parameters, buffers: of the module: the same objects at every call, whose values change.
    """

    def __init__(self, inputs: Sequence[Tensor], parameters: Iterable[Tensor], buffers: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.obstacle: str | None = None
        self._items: list[_Item] = []
        self._names = WeakTensorKeyDictionary()
        self._bound: dict[str, Tensor] = {}
        self._differentiable: set[Name] = set()
        self._memory: set[int] = set()  # of what is differentiable
        self._paused = False
        self._inner: list[_Call] = []
        self._kept: Outputs = ()
        self._count = 0
        self._inputs = [self._name(x, x.requires_grad) for x in inputs]
        self._parameters = [name for p in parameters if (name := self._bind(p)) is not None]
        for buffer in buffers:
            self._bind(buffer)
        lasting = [*inputs, *(self._bound[name] for name in self._parameters)]
        self._lasting = {_address(t) for t in lasting}

    def __enter__(self) -> Tape:
        self._listening = listening.listen(self)
        self._listening.__enter__()
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        self._listening.__exit__(*error)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if self._paused:
            if func.namespace == library.NAMESPACE:
                self._inner.append((func, args, out))
        elif self.obstacle is None:
            self._note(func, args, kwargs or {}, out)
        return out

    def fused(
        self,
        operator: Operator,
        backend: Backend,
        static: Any,
        begun: Outputs,
        tensors: Tensors,
        run: Callable[[], Any],
    ) -> Any:
        self._inner, self._kept = [], ()
        with self._unheard():
            out = run()
            outputs = [out] if isinstance(out, Tensor) else list(out)
            shapes = {i: library.shape_of(t) for i, t in enumerate(tensors) if i in operator.unread and t is not None}
            absent = [o.detach() if o.numel() == 0 else library.shape_of(o) for o in outputs]
        inner, kept = self._inner, self._kept
        self._inner, self._kept = [], ()
        if self.obstacle is None:
            names = [None if t is None else self._variable(t) for t in tensors]
            steps = [self._variable(t) for t in begun]
            results = [self._name(o, o.requires_grad) for o in outputs]
            direct = self._direct(inner, begun, kept, results)
            if direct is None:
                # What a backend does in several steps is done by it again.
                keeps = [self._fresh() for _ in kept]
                again = partial(_run_keeping, backend, static)
                direct = Step(again, [names, steps], {}, [*results, *keeps], True), keeps
            step, keeps = direct
            self._items.append(Fused(operator, backend, static, names, step, results, keeps, shapes, absent))
        return out

    def _direct(
        self, inner: list[_Call], begun: Outputs, kept: Outputs, results: list[Name]
    ) -> tuple[Step, list[Name]] | None:
        """The one operator that a call came down to, and what it keeps; None where there were several."""
        if len(inner) != 1:
            return None
        func, args, out = inner[0]
        outs = [out] if isinstance(out, Tensor) else list(out)
        found = {id(t): name for t, name in zip(outs, results, strict=False)}
        besides = [self._fresh() for _ in outs[len(results) :]]
        found.update((id(t), name) for t, name in zip(outs[len(results) :], besides, strict=True))
        found.update((id(t), self._names[t]) for t in begun)
        read = [t for t in tree_flatten(args)[0] if isinstance(t, Tensor)]
        if not all(id(t) in found for t in kept) or not all(t in self._names for t in read):
            return None
        step = Step(func, [self._template(a) for a in args], {}, [*results, *besides], not isinstance(out, Tensor))
        return step, [found[id(t)] for t in kept]

    def keeps(self, kept: Outputs) -> None:
        self._kept = kept

    def opaque(self, function: Callable[..., Any], args: tuple[Any, ...], differentiable: bool) -> Any:
        with self._unheard():
            out = function(*args)
        if self.obstacle is None:
            templates = [self._template(value) for value in args]
            outs = list(out) if isinstance(out, (tuple, list)) else [out]
            # What it was given and hands back has a new history.
            names = [None if o is None else self._name(o, differentiable, anew=True) for o in outs]
            step = Step(function, templates, {}, names, isinstance(out, (tuple, list)))
            self._items.append(_Alone(step) if differentiable else Plain(step))
        return out

    def function(self, output: Any) -> Callable[..., Any] | None:
        """What takes the inputs and does all that was done; None (see `obstacle`) where that cannot be."""
        leaves, structure = tree_flatten(output)
        results = [self._template(leaf) for leaf in leaves]
        known = {*self._inputs, *self._bound}
        if any(isinstance(r, Name) and r in known for r in results):
            self.obstacle = self.obstacle or "the result is an input or a parameter"
        if sum(isinstance(item, Fused) for item in self._items) < _LEAST_FUSED:
            self.obstacle = self.obstacle or "too few fused operators"
        if self.obstacle is not None:
            return None
        steps = _Links(self._items, self._inputs, self._parameters, self._bound).steps(names_in(results))
        run = function_of(Calls(steps, self._inputs, self._bound, results))
        restructure = partial(tree_unflatten, treespec=structure)
        return lambda *inputs: restructure(run(*inputs))

    @contextmanager
    def _unheard(self) -> Iterator[None]:
        """The calls in the block are no steps of their own."""
        self._paused = True
        try:
            yield
        finally:
            self._paused = False

    def _note(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        outs = list(out) if isinstance(out, (tuple, list)) else [out]
        read = [t for t in tree_flatten((args, kwargs))[0] if isinstance(t, Tensor)]
        if not read and not any(isinstance(o, Tensor) for o in outs):
            return  # a question about dtypes or devices
        if any(tag in func.tags for tag in _DEPENDS_ON_VALUES):
            self.obstacle = f"{func} lets Python see values"
        elif not all(o is None or isinstance(o, Tensor) for o in outs):
            self.obstacle = f"{func} returns values to Python"
        elif func._schema.is_mutable:
            self._check_writes(func, args, kwargs)
        elif any(o is t for o in outs for t in read):
            return  # handed on
        templates = [self._template(value) for value in args]
        named = {key: self._template(value) for key, value in kwargs.items()}
        if self.obstacle is not None:
            return
        followed = torch.is_grad_enabled() and not _ends_history(func)
        followed = followed and any(name in self._differentiable for name in names_in((templates, named)))
        rule = rule_of(func, args, outs) if followed and not named else None
        # New memory may lie where some was that has been freed.
        self._memory -= {_address(o) for o in outs if o is not None} - set(map(_address, read))
        # What a call hands back that it was given keeps its variable.
        names = [None if o is None or o in self._names else self._name(o, followed) for o in outs]
        step = Step(func, templates, named, names, isinstance(out, (tuple, list)))
        if rule is not None:
            self._items.append(Shape(step, rule, step.reads))
        else:
            self._items.append(_Alone(step) if followed else Plain(step))

    def _check_writes(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = dict(zip((a.name for a in func._schema.arguments), args, strict=False)) | kwargs
        for argument in func._schema.arguments:
            if argument.alias_info is None or not argument.alias_info.is_write:
                continue
            for t in tree_flatten(given.get(argument.name))[0]:
                if not isinstance(t, Tensor):
                    continue
                memory = _address(t)
                if memory in self._lasting:
                    self.obstacle = f"{func} changes an input or a parameter"
                elif memory in self._memory:
                    self.obstacle = f"{func} changes what autograd follows"

    def _template(self, value: Any) -> Any:
        """`value` with the function's variables in place of its tensors."""
        if isinstance(value, Tensor):
            return self._variable(value)
        if isinstance(value, (list, tuple)) and any(isinstance(v, Tensor) for v in value):
            return [self._template(v) for v in value]
        return value

    def _variable(self, t: Tensor) -> Any:
        name = self._names.get(t)
        if name is None and self.obstacle is None:
            self.obstacle = f"a tensor {list(t.shape)} comes from neither the inputs nor the module"
        return name

    def _name(self, t: Tensor, differentiable: bool, anew: bool = False) -> Name:
        if anew:
            self._names.pop(t, None)
        name: Name | None = self._names.get(t)
        if name is None:
            name = self._names[t] = self._fresh()
        if differentiable and t.is_floating_point():
            self._differentiable.add(name)
            self._memory.add(_address(t))
        return name

    def _fresh(self) -> Name:
        self._count += 1
        return Name(f"t{self._count}")

    def _bind(self, t: Tensor) -> Name | None:
        """A variable for what belongs to the module; None for what is an input, too."""
        if t in self._names:
            return None
        name = self._name(t, t.requires_grad)
        self._bound[name] = t
        return name


class _Links:
    """Cuts recorded calls into chains and what autograd records by itself."""

    def __init__(
        self, items: list[_Item], inputs: list[Name], parameters: list[Name], bound: dict[str, Tensor]
    ) -> None:
        self._groups = [list(group) for _, group in groupby(items, lambda item: isinstance(item, _Alone))]
        self._makers = {name: item for item in items for name in item.step.results if name is not None}
        self._from_outside = {*inputs, *parameters}
        self._buffers = {name: t for name, t in bound.items() if name not in self._from_outside}
        self._steps: list[Step] = []
        self._made: set[Name] = set()

    def steps(self, results: list[Name]) -> list[Step]:
        """The calls; chains are one each."""
        for index, group in enumerate(self._groups):
            later = [n for g in self._groups[index + 1 :] for item in g for n in item.step.reads]
            wanted = dict.fromkeys(self._roots([*later, *results]))
            if isinstance(group[0], _Alone):
                for item in group:
                    self._look(item.step.reads)
                    self._steps.append(item.step)
            elif any(isinstance(item, Fused) for item in group):
                self._chain(group, wanted)  # type: ignore[arg-type]
            else:
                for item in group:
                    if isinstance(item, Plain):
                        self._look(item.step.reads)
                        self._steps.append(item.step._replace(function=torch.no_grad()(item.step.function)))
        self._look(results)
        return self._steps

    def _roots(self, names: Iterable[Name]) -> Iterator[Name]:
        """The variables that these are only another look at."""
        for name in names:
            maker = self._makers.get(name)
            if isinstance(maker, Shape):
                yield from self._roots(maker.inputs)
            else:
                yield name

    def _look(self, names: Iterable[Name]) -> None:
        """Looks at variables are taken anew wherever they are needed: none of them leaves a chain."""
        for name in names:
            maker = self._makers.get(name)
            if isinstance(maker, Shape) and name not in self._made:
                self._look(maker.inputs)
                self._steps.append(maker.step)
                self._made.update(maker.results)

    def _chain(self, group: list[Link], wanted: dict[Name, None]) -> None:
        links: list[Link] = []
        within: set[Name] = set()

        def add(link: Link) -> None:
            for name in link.step.reads:
                maker = self._makers.get(name)
                if isinstance(maker, Shape) and name not in within:
                    add(maker)
            links.append(link)
            within.update(name for name in link.step.results if name is not None)

        for item in group:
            # One that is needed earlier has been added.
            if not (isinstance(item, Shape) and within.issuperset(item.results)):
                add(item)
        made = [name for link in links if not isinstance(link, Shape) for name in link.step.results if name is not None]
        outputs = [name for name in made if name in wanted]
        read = dict.fromkeys(name for link in links for name in link.step.reads if name not in within)
        inputs = [name for name in read if name not in self._buffers]
        chain = Chain(links, inputs, {name: self._buffers[name] for name in read if name in self._buffers}, outputs)
        self._steps.append(Step(chain, list(inputs), {}, list(outputs), True))


def _address(t: Tensor) -> int:
    """That of the memory that it shares with its views."""
    return t.untyped_storage().data_ptr()


def _ends_history(func: Any) -> bool:
    """Whether autograd follows no result of this operator: it reads no values, or is told to."""
    name = func._schema.name.removeprefix("aten::")
    return name == "detach" or name.startswith("new_") or name.endswith("_like")


def _run_keeping(backend: Backend, static: Any, tensors: Tensors, begun: Sequence[Tensor]) -> Outputs:
    outputs, kept = library.run_keeping(backend, tensors, tuple(begun), static)
    return *outputs, *kept
