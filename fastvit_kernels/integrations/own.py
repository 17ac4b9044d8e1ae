"""Accelerating this library's own modules: they need no other class, but may be pinned to a backend or not prepared."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from fastvit_kernels.integrations.adapter import STATE, Outcome, describe, pack_now
from fastvit_kernels.nn.repetition import Repeating

# What acceleration changes on an instance. A key is missing where the class attribute rules.
_CONFIGURATION = ("backend", "_packed")


def is_own(module: nn.Module) -> bool:
    """Whether this is one of our modules that choose a backend, or derives from one."""
    return hasattr(type(module), "prepare_inference") and hasattr(type(module), "fusion_obstacles")


def is_pinned(module: Any) -> bool:
    """Whether the module runs the reference because somebody chose it."""
    return bool(module.backend == "reference")


def accelerate(module: Any, inference: bool, backend: str | None) -> Outcome:
    """Release the module from a pin to the reference (or pin it to `backend`) and prepare it for inference, or not."""
    before = _describe(module)
    saved = module.__dict__.get(STATE)
    if saved is None:
        saved = {key: module.__dict__[key] for key in _CONFIGURATION if key in module.__dict__}
    pinned = saved.get("backend")
    if backend is None and pinned != "reference":
        backend = pinned
    if module.backend != backend:
        module.backend = backend
    if (module._packed is not None) != inference:
        module.prepare_inference(inference)
    after = _describe(module)
    if before == after:
        return Outcome(before, after, ("already accelerated", *unfused(module)))
    module.__dict__[STATE] = saved
    return Outcome(before, after, tuple(unfused(module)))


def pack(model: nn.Module) -> None:
    """Pack the prepared modules in `model` now, where the module around them knows how it calls them."""
    for module in model.modules():
        pack_weights: Callable[[], None] | None = getattr(module, "pack_weights", None)
        if pack_weights is not None:
            pack_now(module, pack_weights)


def repeat(model: nn.Module, enabled: bool, frozen: bool = False) -> None:
    """Let our models in `model` repeat their calls (`enabled`), or stop them. `frozen`: as in `accelerate`."""
    for module in model.modules():
        if isinstance(module, Repeating):
            module.prepare_repetition(enabled, frozen)


def restore(module: nn.Module) -> Outcome | None:
    """Put back the configuration from before the first `accelerate`; None where there was none."""
    if STATE not in module.__dict__:
        return None
    before = _describe(module)
    saved = module.__dict__.pop(STATE)
    for key in _CONFIGURATION:
        module.__dict__.pop(key, None)
    module.__dict__.update(saved)
    return Outcome(before, _describe(module), ())


def unfused(module: Any) -> list[str]:
    """Why parts of the module would call its submodules if it were called now."""
    return list(module.fusion_obstacles())


def _describe(module: Any) -> str:
    return describe(type(module), module.backend, module._packed is not None)
