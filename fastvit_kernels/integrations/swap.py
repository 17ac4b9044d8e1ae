"""Accelerating one instance of a known host class by changing its class, and back."""

from __future__ import annotations

from torch import nn

from fastvit_kernels.integrations.adapter import STATE, Adapter, Outcome, State, describe, pack_now, state_of
from fastvit_kernels.nn.repetition import Repeater
from fastvit_kernels.ops.packing import PackedWeights


def accelerate(module: nn.Module, adapter: Adapter, inference: bool, backend: str | None) -> Outcome:
    """Make an instance of the host or the accelerated class an accelerated one in this configuration."""
    before = _describe(module)
    if type(module) is adapter.host:
        obstacles = adapter.obstacles(module)
        if obstacles:
            return Outcome(before, before, tuple(obstacles))
        module.__dict__[STATE] = State(backend, None)
        module.__class__ = adapter.fused
    state = state_of(module)
    if not inference:
        state.packed = state.repeater = None
    elif state.packed is None:
        state.packed = {name: PackedWeights() for name in adapter.operators}
    if inference and (state.repeater is None or state.backend != backend):
        # What was recorded of calls belongs to the backend that they ran on.
        state.repeater = Repeater()
    state.backend = backend
    if inference:
        pack_now(module, lambda: adapter.pack(module))
    after = _describe(module)
    reasons = ["already accelerated"] if before == after else []
    return Outcome(before, after, (*reasons, *adapter.unfused(module)))


def restore(module: nn.Module, adapter: Adapter) -> Outcome:
    """Make an accelerated instance one of its host class again."""
    before = _describe(module)
    module.__class__ = adapter.host
    del module.__dict__[STATE]
    return Outcome(before, _describe(module), ())


def _describe(module: nn.Module) -> str:
    if STATE not in module.__dict__:
        return type(module).__name__
    state = state_of(module)
    return describe(type(module), state.backend, state.packed is not None)
