"""Noticing that a module may compute something else than before."""

from __future__ import annotations

from itertools import chain
from operator import is_
from typing import Any

from torch import nn
from torch.nn.modules.module import _has_any_global_hook


class Watch:
    """Notices whatever could change what a module computes: classes, children, parameters (as objects), settings,
    mode, hooks of its submodules, a `forward` replaced on an instance. In-place changes of tensors are the matter of
    `PackedWeights`.

    `modules` starts with the module itself, whose own hooks are called around it in any case.
    """

    def __init__(self, modules: list[nn.Module]) -> None:
        self._modules = modules
        self._types = [type(module) for module in modules]
        self._dicts = [module.__dict__ for module in modules]
        self._hooks = tuple(
            hooks
            for module in modules[1:]
            for hooks in (
                module._forward_hooks,
                module._forward_pre_hooks,
                module._backward_hooks,
                module._backward_pre_hooks,
            )
        )
        names = ("_parameters", "_buffers", "_modules")
        self._tables: list[dict[str, Any]] = [d[name] for d in self._dicts for name in names if d[name]]
        self._values = list(chain.from_iterable(map(dict.values, self._tables)))
        self._keys = [list(attributes) for attributes in self._dicts]
        names_of = [[key for key in attributes if not key.startswith("_")] for attributes in self._dicts]
        found = [(attributes, key) for attributes, keys in zip(self._dicts, names_of, strict=True) for key in keys]
        self._settings = [(attributes, key) for attributes, key in found if _compares(attributes[key])]
        self._objects = [(attributes, key) for attributes, key in found if not _compares(attributes[key])]
        self._setting_values = [attributes[key] for attributes, key in self._settings]
        self._object_values = [attributes[key] for attributes, key in self._objects]

    def hooked(self) -> bool:
        """Whether somebody expects the submodules to be called."""
        return any(self._hooks) or _has_any_global_hook()

    def unchanged(self) -> bool:
        try:
            return self._is_unchanged()
        except (KeyError, RuntimeError, TypeError, ValueError):
            # What cannot even be compared with what it was has changed.
            return False

    def _is_unchanged(self) -> bool:
        return (
            not self.hooked()
            and list(map(type, self._modules)) == self._types
            and list(map(list, self._dicts)) == self._keys
            and sum(map(len, self._tables)) == len(self._values)
            and all(map(is_, chain.from_iterable(map(dict.values, self._tables)), self._values))
            and [attributes[key] for attributes, key in self._settings] == self._setting_values
            and all(map(is_, [attributes[key] for attributes, key in self._objects], self._object_values))
        )


def _compares(value: object) -> bool:
    """Whether equality says that a setting is the same; of anything else (a feature that a hook stored) identity."""
    if isinstance(value, tuple):
        return all(map(_compares, value))
    return value is None or isinstance(value, (bool, int, float, str))
