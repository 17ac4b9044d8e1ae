"""Recording the operator calls behind a module's forward, as a program that makes them again without the module."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten
from torch.utils.weak import WeakTensorKeyDictionary

from fastvit_kernels.nn.calls import Calls, Name, Step
from fastvit_kernels.nn.program import Program
from fastvit_kernels.ops import library, packing
from fastvit_kernels.ops.operator import Operator
from fastvit_kernels.ops.packing import PackedWeights

_DEPENDS_ON_VALUES = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)
# Arguments with which an operator that may draw random numbers draws none.
_SWITCHED_OFF = {"train": False, "p": 0.0, "dropout_p": 0.0}

_Layout = tuple[tuple[int, ...], tuple[int, ...], int]


class Recording(TorchDispatchMode):
    """Collects every operator call of the thread while it is active.

    What makes a call unrepeatable is kept in `obstacle`: randomness, a value that Python looked at, a tensor of unknown
    origin, a write to something that outlives the call.

    Args:
        inputs: the tensors that the program will take, in this order.
        constants: tensors that are the same objects at every call, and whose values may change: parameters, buffers.
    """

    def __init__(self, inputs: Sequence[Tensor], constants: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.obstacle: str | None = None
        self._steps: list[Step] = []
        self._names = WeakTensorKeyDictionary()
        self._views = WeakTensorKeyDictionary()
        self._layouts: dict[str, _Layout] = {}
        self._bound: dict[str, Any] = {}
        self._sources: list[Tensor] = []
        self._weights: list[Tensor] = []
        self._sites: dict[int, tuple[Operator, PackedWeights]] = {}
        self._count = 0
        for constant in constants:
            self._bind(constant)
        self._inputs = [self._names.setdefault(x, Name(f"x{number}")) for number, x in enumerate(inputs)]
        self._layouts |= {self._names[x]: _layout(x) for x in inputs}
        self._lasting = {t.untyped_storage().data_ptr() for t in self._names}

    def __enter__(self) -> Recording:
        self._previous = packing.listen(self._hear_of_packing)
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        packing.listen(self._previous)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        packs = func.namespace == library.NAMESPACE and func._opname.endswith(("_pack", "shelve"))
        if self.obstacle is None and not packs:
            self._note(func, args, kwargs, out)
        return out

    def program(self, output: Any) -> Program | None:
        """The calls so far as a program with this result; None (see `obstacle`) when they cannot be repeated."""
        leaves, structure = tree_flatten(output)
        results = [self._template(leaf) for leaf in leaves]
        if self.obstacle is None and any(isinstance(r, Name) and r in self._bound for r in results):
            self.obstacle = "the result is a parameter"
        if self.obstacle is not None:
            return None
        restructure = partial(tree_unflatten, treespec=structure)
        used = {name for step in self._steps for name in step.reads}
        read = [t for name, t in self._bound.items() if name in used and isinstance(t, Tensor)]
        calls = Calls(self._steps, self._inputs, self._bound, results)
        return Program(calls, [*read, *self._sources], self._weights, restructure)

    def _note(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        leaves = tree_flatten((args, kwargs, out))[0]
        if not any(isinstance(leaf, Tensor) for leaf in leaves):
            return  # a question about dtypes or devices
        named_args = _by_name(func, args, kwargs)
        if torch.Tag.nondeterministic_seeded in func.tags and not any(
            name in named_args and named_args[name] == value for name, value in _SWITCHED_OFF.items()
        ):
            self.obstacle = f"{func} draws random numbers"
            return
        if any(tag in func.tags for tag in _DEPENDS_ON_VALUES):
            self.obstacle = f"{func} lets Python see values"
            return
        outs = list(out) if isinstance(out, (tuple, list)) else [out]
        if not all(o is None or isinstance(o, Tensor) for o in outs):
            self.obstacle = f"{func} returns values to Python"
        elif func._schema.is_mutable:
            self._check_writes(func, named_args)
        elif (len(outs) == 1 and args and outs[0] is args[0]) or self._note_views(func, args, outs):
            return  # handed on, or looked at in another shape
        function, call_args = self._function(func, args)
        templates = [self._template(value) for value in call_args]
        named = {key: self._template(value) for key, value in kwargs.items()}
        if self.obstacle is None:
            results = [None if o is None else self._name(o) for o in outs]
            is_tuple = function is library.repeat or isinstance(out, (tuple, list))
            self._steps.append(Step(function, templates, named, results, is_tuple))

    def _note_views(self, func: Any, args: tuple[Any, ...], outs: list[Any]) -> bool:
        """Whether the call only made views of its first argument (or handed it on).

        Views of constants are made once and for all. Views of other tensors are made where something uses them, in one
        step however many calls led there.
        """
        base = args[0] if args else None
        if not isinstance(base, Tensor) or not any(a.alias_info is not None for a in func._schema.arguments):
            return False
        if not all(isinstance(o, Tensor) and _shares_memory(o, base) for o in outs):
            return False
        for o in outs:
            if o is base:
                continue
            if self._names.get(base) in self._bound:
                self._bind(o)
                self._sources.append(base)
            elif (root := self._views[base][0] if base in self._views else self._names.get(base)) is not None:
                self._views[o] = root, _layout(o)
            else:
                return False
        return True

    def _check_writes(self, func: Any, named_args: dict[str, Any]) -> None:
        for argument in func._schema.arguments:
            if argument.alias_info is not None and argument.alias_info.is_write:
                for t in tree_flatten(named_args.get(argument.name))[0]:
                    if isinstance(t, Tensor) and t.untyped_storage().data_ptr() in self._lasting:
                        self.obstacle = f"{func} changes an input, a parameter or a buffer"

    def _function(self, func: Any, args: tuple[Any, ...]) -> tuple[Callable[..., Any], Sequence[Any]]:
        """What the program calls, with which arguments.

        The packed weights are its own where they were made from constants (`Program.valid` watches those); else they
        are asked for anew at every call.
        """
        if func.namespace == library.NAMESPACE and len(args) > 1 and id(args[1]) in self._sites:
            operator, site = self._sites[id(args[1])]
            weights = [args[0][index] for index in operator.parameters if args[0][index] is not None]
            if not all(self._names.get(w) in self._bound for w in weights):
                return library.repeat, (operator, site, args[0], operator.static(*args[2:]))
            self._weights += weights
            self._bind(args[1])
        return func, args

    def _hear_of_packing(self, packed: Tensor, operator: Operator, site: PackedWeights) -> None:
        self._sites[id(packed)] = operator, site

    def _template(self, value: Any) -> Any:
        """`value` with the program's variables in place of its tensors."""
        if isinstance(value, (Operator, PackedWeights)):
            return value
        return tree_map_only(Tensor, self._variable, value)

    def _variable(self, t: Tensor) -> Any:
        name = self._names.get(t)
        if name is None and t in self._views:
            root, layout = self._views[t]
            if layout == self._layouts[root]:
                return root
            name = self._name(t)
            self._steps.append(Step(torch.as_strided, [root, *layout], {}, [name], False))
        if name is None and self.obstacle is None:
            self.obstacle = f"a tensor {list(t.shape)} comes from neither the inputs nor the module"
        return name

    def _name(self, t: Tensor) -> Name:
        self._count += 1
        name: Name = self._names.setdefault(t, Name(f"t{self._count}"))
        self._layouts.setdefault(name, _layout(t))
        return name

    def _bind(self, t: Tensor) -> None:
        name = Name(f"c{len(self._bound)}")
        if self._names.setdefault(t, name) is name:
            self._bound[name] = t


def _by_name(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of an operator call, those that were left out with their defaults."""
    arguments = func._schema.arguments
    defaults = {a.name: a.default_value for a in arguments if a.has_default_value()}
    return {**defaults, **dict(zip((a.name for a in arguments), args, strict=False)), **kwargs}


def _layout(t: Tensor) -> _Layout:
    return tuple(t.shape), t.stride(), int(t.storage_offset())


def _shares_memory(a: Tensor, b: Tensor) -> bool:
    return a.dtype is b.dtype and a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()
