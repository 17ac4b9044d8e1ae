"""Noticing that a module may compute something else than before."""

from __future__ import annotations

import platform
from collections import defaultdict
from itertools import chain
from operator import getitem, is_, itemgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

_TABLES = ("_parameters", "_buffers", "_modules")
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
# Whose modules keep everything that their forwards look at in parameters, buffers, children and public settings.
_KNOWN_CODE = {"fastvit_kernels", "timm", "torch", "transformers"}
# The addresses of a dictionary's arrays are the last two words of the object.
_ARRAYS = dict.__basicsize__ - 16


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
        self._sizes = list(map(len, self._dicts))
        self._hooks = [attributes[name] for attributes in self._dicts[1:] for name in _HOOKS]
        tables = [(attributes, name) for attributes in self._dicts for name in _TABLES]
        self._bare = [attributes[name] for attributes, name in tables if not attributes[name]]
        self._owners = [attributes for attributes, name in tables if attributes[name]]
        self._filled = [name for attributes, name in tables if attributes[name]]
        self._values = list(chain.from_iterable(map(dict.values, self._tables())))
        found = [(attributes, key) for attributes in self._dicts for key in attributes if not key.startswith("_")]
        self._objects = [(attributes, key) for attributes, key in found if not _compares(attributes[key])]
        self._object_values = [attributes[key] for attributes, key in self._objects]
        # Modules with settings of the same names are looked at in one go: one expression per module costs too much.
        alike: dict[tuple[str, ...], list[dict[str, Any]]] = defaultdict(list)
        for attributes in self._dicts:
            alike[tuple(k for k, v in attributes.items() if not k.startswith("_") and _compares(v))].append(attributes)
        looks = [(itemgetter(*_TABLES, *_HOOKS, *names), dicts) for names, dicts in alike.items()]
        self._settings = [(look, dicts, list(map(look, dicts))) for look, dicts in looks]
        self._ahead = self._addresses()

    def knows_everything(self) -> bool:
        """Whether all modules are of libraries whose code is known; a user's own class may look at anything."""
        return all(cls.__module__.partition(".")[0] in _KNOWN_CODE for cls in self._types)

    def hooked(self) -> bool:
        """Whether somebody expects the submodules to be called."""
        return any(self._hooks) or _has_any_global_hook()

    def unchanged(self) -> bool:
        if self._ahead is not None:
            torch.ops.fastvit.fetch_ahead(*self._ahead, _ARRAYS)
        try:
            return self._is_unchanged()
        except (KeyError, RuntimeError, TypeError, ValueError):
            # What cannot even be compared with what it was has changed.
            return False

    def _is_unchanged(self) -> bool:
        tables = self._tables()
        return (
            not self.hooked()
            and not any(self._bare)
            and list(map(type, self._modules)) == self._types
            and list(map(len, self._dicts)) == self._sizes
            and all(list(map(look, dicts)) == found for look, dicts, found in self._settings)
            and sum(map(len, tables)) == len(self._values)
            and all(map(is_, chain.from_iterable(map(dict.values, tables)), self._values))
            and all(map(is_, [attributes[key] for attributes, key in self._objects], self._object_values))
        )

    def _tables(self) -> list[dict[str, Any]]:
        """The tables of parameters, buffers and children that were not empty, as they are now."""
        return list(map(getitem, self._owners, self._filled))

    def _addresses(self) -> tuple[Tensor, Tensor] | None:
        """Where everything lies that is looked at, and which of it are dictionaries: hundreds of small objects, of
        which none is in a cache behind a forward. Nothing in interpreters that do not tell addresses."""
        if platform.python_implementation() != "CPython":
            return None
        dicts = [*self._dicts, *self._tables()]
        objects = [*self._modules, *self._hooks, *self._bare, *self._values]
        return torch.tensor(list(dict.fromkeys(map(id, objects)))), torch.tensor(list(map(id, dicts)))


def _compares(value: object) -> bool:
    """Whether equality says that a setting is the same; of anything else (a feature that a hook stored) identity."""
    if isinstance(value, tuple):
        return all(map(_compares, value))
    return value is None or isinstance(value, (bool, int, float, str))
