"""Recorded operator calls."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch.utils._pytree import tree_flatten


class Name(str):
    """A variable of the program."""


class Step(NamedTuple):
    """One call: templates have variables' names in place of tensors."""

    function: Callable[..., Any]
    args: Any
    kwargs: dict[str, Any]
    results: list[Name | None]
    is_tuple: bool

    @property
    def reads(self) -> list[Name]:
        """The variables that it is called with."""
        return names_in((self.args, self.kwargs))


@dataclass(frozen=True)
class Calls:
    """What a recording has found.

    Attributes:
        steps: the calls, in order.
        inputs: the variables that stand for the inputs.
        bound: what other variables stand for, at every call.
        results: the templates of the output's leaves.
    """

    steps: list[Step]
    inputs: list[Name]
    bound: dict[str, Any]
    results: list[Any]


def names_in(template: Any) -> list[Name]:
    """The variables in a template."""
    return [leaf for leaf in tree_flatten(template)[0] if isinstance(leaf, Name)]
