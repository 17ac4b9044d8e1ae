"""What a public function hands to its registered operator."""

from __future__ import annotations

from typing import Any
from unittest import mock

from torch import Tensor

from fastvit_kernels.ops import library
from fastvit_kernels.testing.calls import Call


class _Stop(Exception):
    pass


def raw_call(call: Call) -> tuple[list[Tensor | None], Any]:
    """The dense tensor list and the static arguments of the operator that `call`, a public function, would run."""
    found: list[Any] = []

    def catch(operator: Any, tensors: Any, static: Any, **options: Any) -> Any:
        found.extend((library.dense(tensors), static))
        raise _Stop

    with mock.patch.object(library, "call", catch):
        try:
            call.fresh()()
        except _Stop:
            return found[0], found[1]
    raise TypeError(f"call: expected a public operator function, got {call.function}")
