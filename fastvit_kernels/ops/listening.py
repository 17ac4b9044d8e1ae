"""Who follows what this thread's operators do, to make the same calls again."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from fastvit_kernels.ops.operator import Backend, Operator, Outputs, Tensors


class Listener(Protocol):
    """Makes the calls that it hears of."""

    def fused(
        self,
        operator: Operator,
        backend: Backend,
        static: Any,
        begun: Outputs,
        tensors: Tensors,
        run: Callable[[], Any],
    ) -> Any:
        """A call whose gradients are wanted; `run` makes it."""

    def keeps(self, kept: Outputs) -> None:
        """What the call being made keeps for its gradients besides its tensors."""

    def opaque(self, function: Callable[..., Any], args: tuple[Any, ...], differentiable: bool) -> Any:
        """A function of tensors that must be called as a whole."""


class _State(threading.local):
    listener: Listener | None = None


_state = _State()


def listener() -> Listener | None:
    """This thread's."""
    return _state.listener


@contextmanager
def listen(to: Listener) -> Iterator[None]:
    """Tell `to` of every call that this thread makes in the block."""
    previous, _state.listener = _state.listener, to
    try:
        yield
    finally:
        _state.listener = previous


def whole(function: Callable[..., Any], *args: Any, differentiable: bool = False) -> Any:
    """`function(*args)`, which a listener hears of as one call.

    `differentiable`: autograd records it.
    """
    heard_by = _state.listener
    return function(*args) if heard_by is None else heard_by.opaque(function, args, differentiable)
