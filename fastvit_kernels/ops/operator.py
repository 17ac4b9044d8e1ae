"""What a fused operator is: a schema, a reference, and the backends that can stand in for it."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

Tensors = Sequence["Tensor | None"]
Outputs = tuple[Tensor, ...]


class Backend(Protocol):
    """One way to run an operator. `supports` lists every reason it cannot (an empty list: it can).

    A backend that is a `BackwardBackend`, too, has kernels for the gradients; `dispatch.gradient_backend` says who
    computes those of all others.
    """

    @property
    def name(self) -> str: ...

    def supports(self, tensors: Tensors, static: Any) -> list[str]: ...

    def run(self, tensors: Tensors, packed: Tensor | None, static: Any) -> Outputs: ...


class BackwardBackend(ABC):
    """The gradients of one way to run an operator.

    `supports_backward` lists every reason it cannot compute the wanted ones, beyond those of `supports`. `run_backward`
    returns one fresh dense tensor for each tensor that `needs` asks for, in order, of its shape and dtype. `grads` are
    the row-major gradients of the outputs, where `GradientKernels.reads_outputs` with the outputs themselves behind
    them, and with what `run_keeping` or a `TwoStepBackend` kept at the end; `tensors` those of the forward.
    """

    @abstractmethod
    def supports_backward(
        self, grads: Sequence[Tensor], tensors: Tensors, needs: Sequence[bool], static: Any
    ) -> list[str]: ...

    @abstractmethod
    def run_backward(
        self, grads: Sequence[Tensor], tensors: Tensors, needs: Sequence[bool], static: Any
    ) -> list[Tensor]: ...


class TwoStepBackend(ABC):
    """A backend whose kernels for batch statistics do most of the call: `finish` does the rest.

    `begun` is what they kept for the gradients, maybe empty, and what `finish` reads.
    """

    @abstractmethod
    def finish(self, tensors: Tensors, begun: Outputs, static: Any) -> Outputs: ...


class GradientKernels(BackwardBackend):
    """The `BackwardBackend` part of a backend with kernels for every gradient; one that refuses some says which.

    Attributes:
        backward: the operator `name_backward` and its overload.
    """

    backward: ClassVar[tuple[str, str]]

    def adds_own(self, tensors: Tensors, static: Any) -> bool:
        """Whether, where the residual is x itself, the kernels add the residual's gradient, that of the first output,
        to x's: `run_backward` then takes one entry more in `needs`, True."""
        return False

    @abstractmethod
    def run(self, tensors: Tensors, packed: Tensor | None, static: Any) -> Outputs: ...

    def run_keeping(self, tensors: Tensors, static: Any) -> tuple[Outputs, Outputs]:
        """`run`, and what spares the gradients a good part of their work; by default nothing."""
        return self.run(tensors, None, static), ()

    def reads_outputs(self, static: Any) -> bool:
        """Whether the kernels need the outputs: they take them behind their gradients, or run the forward again."""
        return False

    def supports_backward(
        self, grads: Sequence[Tensor], tensors: Tensors, needs: Sequence[bool], static: Any
    ) -> list[str]:
        return []

    def run_backward(
        self, grads: Sequence[Tensor], tensors: Tensors, needs: Sequence[bool], static: Any
    ) -> list[Tensor]:
        return list(_kernels(*self.backward)(list(grads), list(tensors), list(needs), *static))


@functools.cache
def _kernels(name: str, overload: str) -> Callable[..., Sequence[Tensor]]:
    found: Callable[..., Sequence[Tensor]] = getattr(getattr(torch.ops.fastvit, name), overload)
    return found


@dataclass(eq=False)
class Operator:
    """A fused operator and everything `library` needs to register it.

    Attributes:
        name: the operator's name in every room of the house (`fastvit::<name>`).
        static: a NamedTuple class; its fields are the operator's non-tensor arguments, in schema order.
        static_schema: the same fields in torch's schema language.
        parameters: positions of the weights in the tensor list (the rest are activations).
        returns: the number of output tensors.
        reference: plain PyTorch `(tensors, static) -> outputs`: the definition of the operator.
        fake: shapes, strides and dtypes of the outputs, `(tensors, static) -> outputs`.
        packing: what of the static arguments decides how weights are packed, besides their dtype.
        any_layout: positions of activations that the CPU kernels take in any layout.
        triton_any_layout: those that the Triton kernels do.
        residual: position of the activation that is added to the first output, so that their gradients are the same,
            unless another output depends on it, too.
        residual_in_all: whether another output does.
        unread: positions of tensors of which gradients take no more than shape and dtype: they are not kept for them.
        backends: the alternatives to the reference, most preferred first where no measurement says otherwise; `"sdpa"`
            last.
        loose_on_cpu: positions of what the CPU kernels take in any layout: those activations, and the weights, which
            they only read to pack them.
    """

    name: str
    static: type
    static_schema: str
    parameters: tuple[int, ...]
    returns: int
    reference: Callable[[Tensors, Any], Outputs]
    fake: Callable[[Tensors, Any], Outputs]
    packing: Callable[[Any], tuple[Any, ...]] = lambda static: ()
    any_layout: tuple[int, ...] = ()
    triton_any_layout: tuple[int, ...] = ()
    residual: int | None = None
    residual_in_all: Callable[[Any], bool] = lambda static: False
    unread: tuple[int, ...] = ()
    backends: list[Backend] = field(default_factory=list)
    loose_on_cpu: frozenset[int] = field(init=False)

    def __post_init__(self) -> None:
        self.loose_on_cpu = frozenset(self.parameters + self.any_layout)
