"""A list of recorded calls as a function."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastvit_kernels.nn import plans
from fastvit_kernels.nn.calls import Calls, Name, names_in
from fastvit_kernels.ops import packing

_unchanged = torch.ops.fastvit.places_unchanged.default


class Places:
    """Where tensors lie, and how.

    Args:
        tensors: on a CPU.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._number = torch.ops.fastvit.places_note(list({id(t): t for t in tensors}.values()))
        weakref.finalize(self, torch.ops.fastvit.places_forget, self._number)

    def unchanged(self) -> bool:
        """Whether all of them still lie there, with the same shapes, strides and dtypes."""
        return bool(_unchanged(self._number))


class Program:
    """The calls of one recording.

    Args:
        calls: what to do.
        sources: tensors that it reads, or of which it holds views.
        weights: tensors of which it holds the packed form.
        restructure: makes the output of the list of its leaves.
    """

    def __init__(
        self,
        calls: Calls,
        sources: list[Tensor],
        weights: list[Tensor],
        restructure: Callable[[list[Any]], Any],
    ) -> None:
        self._calls = calls
        self._run = function_of(calls)
        self._planned: Callable[..., list[Any]] | None = None
        self._restructure = restructure
        self._places = Places(sources)
        self._weights = list({id(t): t for t in weights}.values())
        self._versions = packing.versions(self._weights)

    def plan(self, inputs: Sequence[Tensor]) -> None:
        """From now on neighbouring calls of operators are made in one, as they are made with these inputs."""
        planned, numbers = plans.plan(self._calls, inputs)
        if numbers:
            weakref.finalize(self, plans.forget, numbers)
            self._planned = function_of(planned)

    def valid(self) -> bool:
        """Whether the sources, the weights among them, lie where and as they did, and the weights besides have not been
        written to."""
        return self._places.unchanged() and packing.versions(self._weights) == self._versions

    def run(self, inputs: Sequence[Tensor]) -> Any:
        """The recorded output's structure with the results of calling everything again on other inputs."""
        if self._planned is not None:
            try:
                return self._restructure(self._planned(*inputs))
            except plans.Unusable:
                pass
        return self._restructure(self._run(*inputs))


def function_of(calls: Calls) -> Callable[..., list[Any]]:
    """Calls everything with these inputs; returns the results."""
    namespace = dict(calls.bound)
    exec(compile(_source(calls, namespace), "<recorded calls>", "exec"), namespace)
    function: Callable[..., list[Any]] = namespace["program"]
    return function


def _source(calls: Calls, namespace: dict[str, Any]) -> str:
    """The function's text; what it names besides variables is added to the namespace.

    Variables are deleted behind their last use, so memory is what it was in the module.
    """

    def constant(value: Any) -> str:
        name = f"v{len(namespace)}"
        namespace[name] = value
        return name

    def text(template: Any) -> str:
        if isinstance(template, Name):
            return template
        if type(template) is list:
            return f"[{', '.join(map(text, template))}]"
        return repr(template) if template is None or isinstance(template, (bool, int)) else constant(template)

    last_use: dict[str, int] = {}
    for number, step in enumerate(calls.steps):
        last_use |= dict.fromkeys(names_in((step.args, step.kwargs, step.results)), number)
    kept = {*calls.bound, *names_in(calls.results)}
    expiring: list[list[str]] = [[] for _ in calls.steps]
    for variable, number in last_use.items():
        if variable not in kept:
            expiring[number].append(variable)
    lines = [f"def program({', '.join(dict.fromkeys(calls.inputs))}):"]
    for step, names in zip(calls.steps, expiring, strict=True):
        call = ", ".join([*map(text, step.args), *(f"{k}={text(v)}" for k, v in step.kwargs.items())])
        targets = ", ".join("_" if r is None else r for r in step.results)
        comma = "," if step.is_tuple and len(step.results) == 1 else ""
        lines.append(f"    {targets}{comma} = {constant(step.function)}({call})")
        if names:
            lines.append(f"    del {', '.join(names)}")
    lines.append(f"    return [{', '.join(map(text, calls.results))}]")
    return "\n".join(lines)
