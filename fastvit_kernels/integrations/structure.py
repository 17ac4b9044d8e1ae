"""Whether the modules around the fused operators are what their library puts there."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import nn

from fastvit_kernels.nn import fused

NO_DROPOUT = nn.Identity()


def code_obstacles(
    root: nn.Module,
    expected: Mapping[tuple[str, ...], type[nn.Module]],
    hooked: Callable[[nn.Module], bool] = fused.has_hooks,
) -> list[str]:
    """Why modules whose code the fused operators stand in for would not do what that code does.

    Args:
        root: the accelerated module.
        expected: the class each of them must have, by its path from `root`.
        hooked: whether somebody expects a module to be called.
    """
    reasons = []
    for path, cls in expected.items():
        name, module = ".".join(path), child(root, path)
        if module is None:
            reasons.append(f"has no {name}")
        elif type(module) is not cls:
            reasons.append(f"{name} is a {type(module).__name__}, expected {cls.__name__}")
        elif hooked(module):
            reasons.append(f"{name} has hooks")
    return reasons


def child(root: nn.Module, path: tuple[str, ...]) -> nn.Module | None:
    """The module at this path below `root`, or None."""
    module: nn.Module | None = root
    for name in path:
        module = None if module is None else module._modules.get(name)
    return module


def own_parameters_obstacles(module: nn.Module) -> list[str]:
    """Why the parameters of a module of a known class may not be read instead of calling it."""
    if fused.has_hooks(module):
        return ["has hooks"]
    if not all(parameter is None or type(parameter) is nn.Parameter for parameter in module._parameters.values()):
        return ["holds no plain parameters"]
    return []


def in_evaluation(dropout: nn.Module, lasting: bool) -> nn.Module:
    """The dropout itself; with `lasting` one that drops nothing where it is merely at work, as training has it."""
    return NO_DROPOUT if lasting and type(dropout) is nn.Dropout and not fused.has_hooks(dropout) else dropout
