"""Neighbouring calls of operators in a recorded program as one call of a plan, which C++ makes: see csrc/cpu/plan.h."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from fastvit_kernels.nn.calls import Calls, Name, Step, names_in
from fastvit_kernels.ops import library

# While a plan is made its tensors are all kept.
_MOST_BYTES = 256 << 20


class Unusable(Exception):
    """A plan cannot run now: another thread runs it, or a weight has changed in a way that only the plan has seen."""


def plan(calls: Calls, inputs: Sequence[Tensor]) -> tuple[Calls, list[int]]:
    """The same calls with those of our operators in plans, and the plans' numbers, for `forget`.

    Args:
        inputs: some to make all calls with.
    """
    values: dict[Any, Any] = {**calls.bound, **dict(zip(dict.fromkeys(calls.inputs), inputs, strict=True))}
    steps: list[Step] = []
    numbers: list[int] = []
    for segment, later in _segments(calls):
        planned = None
        if any(_is_operator(step, calls) for step in segment):
            planned = _planned(segment, later, values, calls)
        else:
            _make(segment, values)
        if planned is None:
            steps += segment
        else:
            steps += planned
            numbers.append(planned[0].args[1])
        if _kept(calls, values) > _MOST_BYTES:
            forget(numbers)
            return calls, []
    return Calls(steps, calls.inputs, calls.bound, calls.results), numbers


def forget(numbers: Sequence[int]) -> None:
    """Let go of plans."""
    for number in numbers:
        torch.ops.fastvit.plan_forget(number)


def replay(inputs: list[Tensor], number: int) -> list[Tensor]:
    """The results of a plan.

    Raises:
        Unusable: it has not been run.
    """
    outputs: list[Tensor] = _replay(inputs, number)
    if not outputs:
        raise Unusable
    return outputs


_replay = torch.ops.fastvit.plan_replay.default


def _segments(calls: Calls) -> Iterator[tuple[list[Step], set[Name]]]:
    """The calls in groups of which a plan can be made or not, and the variables that are used behind each."""
    groups = [
        list(group) for _, group in groupby(calls.steps, lambda step: _is_operator(step, calls) or _is_view(step))
    ]
    used = [{name for step in group for name in step.reads} for group in groups]
    used.append(set(names_in(calls.results)))
    for number, group in enumerate(groups):
        yield group, set().union(*used[number + 1 :])


def _is_operator(step: Step, calls: Calls) -> bool:
    """Whether it calls the CPU kernels of one of our operators with weights that are packed, or bound, for good."""
    name = getattr(step.function, "_opname", None)
    if getattr(step.function, "namespace", None) != library.NAMESPACE:
        return False
    if name in library.in_place:
        return all(t is None or t in calls.bound for t in step.args[1][library.in_place[name] :])
    return (
        name in library.operators
        and step.function._overloadname == "default"  # type: ignore[attr-defined]
        and (step.args[1] in calls.bound or not library.operators[name].parameters)
    )


def _is_view(step: Step) -> bool:
    return step.function is torch.as_strided


def _planned(segment: list[Step], later: set[Name], values: dict[Any, Any], calls: Calls) -> list[Step] | None:
    """Steps that do the same by a plan, the plan first; None where none can be made. Makes the calls."""
    roots = {step.results[0]: step.args[0] for step in segment if _is_view(step)}
    made = [name for step in segment if not _is_view(step) for name in step.results if name is not None]
    read = [roots.get(name, name) for step in segment if not _is_view(step) for name in _activations(step)]
    inputs = [name for name in dict.fromkeys(read) if name not in made]
    views = [step for step in segment if _is_view(step) and step.results[0] in later]
    needed = later | {step.args[0] for step in views}
    outputs = [name for name in made if name in needed]
    torch.ops.fastvit.plan_begin()
    try:
        _make(segment, values)
    except BaseException:
        torch.ops.fastvit.plan_end([], [])
        raise
    number = torch.ops.fastvit.plan_end([values[name] for name in inputs], [values[name] for name in outputs])
    if number == 0:
        return None
    return [Step(replay, [inputs, number], {}, [*outputs], True), *views]


def _kept(calls: Calls, values: dict[Any, Any]) -> int:
    """Bytes of what the calls have made so far."""
    made = [values[name] for step in calls.steps if not _is_view(step) for name in step.results if name in values]
    return sum(t.nbytes for t in made)


def _activations(step: Step) -> list[Name]:
    """The tensors of a call of an operator that are no weights."""
    if (count := library.in_place.get(step.function._opname)) is not None:  # type: ignore[attr-defined]
        return [step.args[0], *step.args[1][:count]]
    parameters = library.operators[step.function._opname].parameters  # type: ignore[attr-defined]
    return [t for index, t in enumerate(step.args[0]) if t is not None and index not in parameters]


def _make(steps: list[Step], values: dict[Any, Any]) -> None:
    """Make the calls; what they return is added to the values."""

    def value(leaf: Any) -> Any:
        return values[leaf] if isinstance(leaf, Name) else leaf

    for step in steps:
        found = step.function(*tree_map(value, list(step.args)), **tree_map(value, step.kwargs))
        results = found if step.is_tuple else [found]
        values.update((name, result) for name, result in zip(step.results, results, strict=True) if name is not None)
