"""A call that the contract suite can repeat in other dtypes, layouts and backends, and differentiate."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

_BUFFERS = ("running_mean", "running_var")


class Results(NamedTuple):
    """What a call left behind: outputs, gradients by leaf name, and buffers it updated."""

    outputs: list[Tensor]
    gradients: dict[str, Tensor | None]
    buffers: dict[str, Tensor]


@dataclass(frozen=True)
class Call:
    """A function or module with its arguments by name.

    Leaves are the floating tensors that may get a gradient, named like the argument they came in (`query.bn.weight`)
    or, for a module's parameters, `module.<name>`. Running statistics are buffers: no gradient, updated in place.
    """

    function: Callable[..., Any]
    arguments: dict[str, Any]

    def __call__(self) -> Any:
        return self.function(**self.arguments)

    def leaves(self) -> dict[str, Tensor]:
        return {name: t for name, t in self._tensors() if not name.endswith(_BUFFERS)} | self._module("parameters")

    def buffers(self) -> dict[str, Tensor]:
        return {name: t for name, t in self._tensors() if name.endswith(_BUFFERS)} | self._module("buffers")

    def map(self, change: Callable[[Tensor], Tensor]) -> Call:
        """The same call with all floating tensors detached and changed (a module is copied first)."""
        function = self.function
        if isinstance(function, nn.Module):
            function = copy.deepcopy(function)._apply(lambda t: change(t) if t.is_floating_point() else t)
        arguments = pytree.tree_map(lambda leaf: change(leaf.detach()) if _is_floating(leaf) else leaf, self.arguments)
        return replace(self, function=function, arguments=arguments)

    def fp64(self) -> Call:
        return self.map(lambda t: t.double())

    def fresh(self) -> Call:
        """The same call on new leaves of the same memory and strides, and on copies of the buffers."""
        same = self.map(lambda t: t)
        return same.with_leaves({name: t.clone() for name, t in same._tensors() if name.endswith(_BUFFERS)})

    def with_leaves(self, values: Mapping[str, Tensor]) -> Call:
        """The same call with some of its tensors replaced, a module's parameters through `functional_call`."""
        arguments = {key: _rebuild(key, value, values) for key, value in self.arguments.items()}
        function = self.function
        parameters = {name.removeprefix("module."): t for name, t in values.items() if name.startswith("module.")}
        if parameters:
            module = function
            assert isinstance(module, nn.Module)

            def function(**kwargs: Any) -> Any:
                return torch.func.functional_call(module, parameters, (), kwargs)

        return replace(self, function=function, arguments=arguments)

    def _tensors(self) -> Iterator[tuple[str, Tensor]]:
        for key, value in self.arguments.items():
            yield from _named(key, value)

    def _module(self, kind: str) -> dict[str, Tensor]:
        if not isinstance(self.function, nn.Module):
            return {}
        named = self.function.named_parameters() if kind == "parameters" else self.function.named_buffers()
        return {f"module.{name}": t for name, t in named if t.is_floating_point()}


def _is_floating(value: object) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _named(name: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield name, value
    elif isinstance(value, tuple) and hasattr(value, "_fields"):
        for field, item in zip(value._fields, value, strict=True):
            yield from _named(f"{name}.{field}", item)


def _rebuild(name: str, value: Any, values: Mapping[str, Tensor]) -> Any:
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(
            *(_rebuild(f"{name}.{field}", item, values) for field, item in zip(value._fields, value, strict=True))
        )
    return values.get(name, value)


def as_list(outputs: Any) -> list[Tensor]:
    """Every tensor a call returned."""
    return [leaf for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, Tensor)]


def cotangents(outputs: Sequence[Tensor], seed: int = 1) -> list[Tensor]:
    """Random output gradients; the same values, rounded, for every dtype."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(o.shape, generator=generator, dtype=torch.float64).to(o.dtype).to(o.device) for o in outputs]


def differentiate(
    call: Call,
    run: Callable[[Call], Any] | None = None,
    grads: Callable[[Sequence[Tensor]], Sequence[Tensor]] = cotangents,
    fresh: bool = True,
) -> Results:
    """Outputs, all gradients and updated buffers of a fresh copy of `call`, run by `run` (default: called as it is).

    Without `fresh` it is `call` itself that runs, whose tensors then require gradients.
    """
    if fresh:
        call = call.fresh()
    leaves = call.leaves()
    for leaf in leaves.values():
        leaf.requires_grad_()
    outputs = as_list(call() if run is None else run(call))
    found = torch.autograd.grad(outputs, list(leaves.values()), list(grads(outputs)), allow_unused=True)
    return Results([o.detach() for o in outputs], dict(zip(leaves, found, strict=True)), call.buffers())
