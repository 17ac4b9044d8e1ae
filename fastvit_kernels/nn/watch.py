"""Noticing that a module may compute something else than before."""

from __future__ import annotations

from itertools import chain
from operator import is_, itemgetter
from typing import Any

from torch import nn
from torch.nn.modules.module import _has_any_global_hook

_TABLES = ("_parameters", "_buffers", "_modules")
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_DICTS = itemgetter(*_TABLES, *_HOOKS)
# Whose modules keep everything that their forwards look at in parameters, buffers, children and public settings.
_KNOWN_CODE = {"fastvit_kernels", "timm", "torch", "transformers"}


class Watch:
    """Notices whatever could change what a module computes: classes, children, parameters (as objects), settings,
    mode, hooks of its submodules, a `forward` replaced on an instance. In-place changes of tensors are the matter of
    whoever uses them.

    It cannot see what code of other origin may look at (private attributes, the contents of a list, globals): ask
    `knows_everything`.

    `modules` starts with the module itself, whose own hooks are called around it in any case.
    """

    def __init__(self, modules: list[nn.Module]) -> None:
        self._modules = modules
        self._types = [type(module) for module in modules]
        self._dicts = [module.__dict__ for module in modules]
        self._parts = list(chain.from_iterable(map(_DICTS, self._dicts)))
        self._hooks = [attributes[name] for attributes in self._dicts[1:] for name in _HOOKS]
        self._tables: list[dict[str, Any]] = [attributes[name] for attributes in self._dicts for name in _TABLES]
        self._filled = [table for table in self._tables if table]
        self._values = list(chain.from_iterable(map(dict.values, self._filled)))
        self._keys = [list(attributes) for attributes in self._dicts]
        names_of = [[key for key in attributes if not key.startswith("_")] for attributes in self._dicts]
        found = [(attributes, key) for attributes, keys in zip(self._dicts, names_of, strict=True) for key in keys]
        self._settings = [(attributes, key) for attributes, key in found if _compares(attributes[key])]
        self._objects = [(attributes, key) for attributes, key in found if not _compares(attributes[key])]
        self._setting_values = [attributes[key] for attributes, key in self._settings]
        self._object_values = [attributes[key] for attributes, key in self._objects]

    def knows_everything(self) -> bool:
        """Whether all modules are of libraries whose code is known; a user's own class may look at anything."""
        return all(cls.__module__.partition(".")[0] in _KNOWN_CODE for cls in self._types)

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
            and all(map(is_, chain.from_iterable(map(_DICTS, self._dicts)), self._parts))
            and sum(map(len, self._tables)) == len(self._values)
            and all(map(is_, chain.from_iterable(map(dict.values, self._filled)), self._values))
            and [attributes[key] for attributes, key in self._settings] == self._setting_values
            and all(map(is_, [attributes[key] for attributes, key in self._objects], self._object_values))
        )


def _compares(value: object) -> bool:
    """Whether equality says that a setting is the same; of anything else (a feature that a hook stored) identity."""
    if isinstance(value, tuple):
        return all(map(_compares, value))
    return value is None or isinstance(value, (bool, int, float, str))
