"""What an integration provides: a host class, the class that stands in for it, and when it may.

Acceleration changes the class of an instance and nothing else, so parameters, buffers, hooks, children, `state_dict`
keys and everybody's references stay what they were. What the new class needs beside the host's attributes is one
`State` in the instance's `__dict__`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn

from fastvit_kernels.integrations.derived import Derived
from fastvit_kernels.nn.repetition import Repeater
from fastvit_kernels.ops.dispatch import BackendError
from fastvit_kernels.ops.packing import PackedWeights

STATE = "_fastvit"


@dataclass
class State:
    """What an accelerated module carries.

    Attributes:
        backend: passed to its operators.
        packed: packed weights by operator name, or None when it is not prepared for inference.
        repeater: repeats its operator calls when it is.
        derived: what its operators take that is computed from parameters, kept beside the packed weights.
        call: why the latest call ran parts of the host's own code for what it was called with.
    """

    backend: str | None
    packed: dict[str, PackedWeights] | None
    repeater: Repeater | None = None
    derived: Derived = field(default_factory=Derived)
    call: tuple[str, ...] = ()


@dataclass(frozen=True)
class Adapter:
    """One host class and its accelerated form.

    Attributes:
        host: the class as its library defines it; only exact instances are replaced.
        fused: a subclass of `host` that overrides `forward` and nothing else.
        operators: names of the call sites that keep packed weights in `fused`, mostly those of their operators.
        obstacles: why an instance of `host` must be left alone.
        unfused: why parts of an accelerated instance would run the host's own code if it were called now.
        pack: packs the weights of an accelerated and prepared instance now, not at its first call.
        part: inside another known module an instance is left to that one, whether it can be accelerated or not.
    """

    host: type[nn.Module]
    fused: type[nn.Module]
    operators: tuple[str, ...]
    obstacles: Callable[[nn.Module], list[str]]
    unfused: Callable[[nn.Module], list[str]]
    pack: Callable[[nn.Module], None]
    part: bool = False


class Outcome(NamedTuple):
    """What became of one known module.

    Attributes:
        before, after: class and configuration; equal when nothing changed.
        reasons: why nothing changed, or why parts of an accelerated module would run unfused if it were called now.
    """

    before: str
    after: str
    reasons: tuple[str, ...]


def state_of(module: nn.Module) -> State:
    """The state of an accelerated module."""
    state = module.__dict__[STATE]
    assert isinstance(state, State)
    return state


def repeated(module: nn.Module, compute: Callable[..., Any], *inputs: Any) -> Any:
    """`compute(module, *inputs)`, the forward of an accelerated module; repeated when it is prepared for inference.

    It may depend on nothing but the inputs and what the module and its submodules hold.
    """
    repeater = state_of(module).repeater
    if repeater is None or torch.compiler.is_compiling():
        return compute(module, *inputs)
    return repeater(module, partial(compute, module), *inputs)


def pack_now(module: nn.Module, pack: Callable[[], None]) -> None:
    """Call `pack` if the CPU kernels are going to read the module's weights as they are, in evaluation mode."""
    if any(child.training for child in module.modules()) or any(p.device.type != "cpu" for p in module.parameters()):
        return
    # A chosen backend that cannot run says so at the model's first call, with or without packing.
    with contextlib.suppress(BackendError):
        pack()


def describe(cls: type, backend: str | None, prepared: bool) -> str:
    """A class and its configuration, as reports show it."""
    words = [cls.__name__]
    if prepared:
        words.append("weights packed")
    if backend is not None:
        words.append(f"backend {backend!r}")
    return ", ".join(words)
