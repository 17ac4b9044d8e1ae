"""Repeating a block's fused calls without asking again whether they may be fused.

At batch 1 a block's kernels take a fraction of a millisecond, and looking at some twenty submodules and checking their
parameters before each of them costs a good part of that. A block that is prepared for inference and has just run
entirely on fused operators remembers what it looked at, and repeats the calls as long as nothing of it has changed.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from operator import is_
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from fastvit_kernels.ops import dispatch, library
from fastvit_kernels.ops.arguments import compute_dtype
from fastvit_kernels.ops.packing import LastCall, PackedWeights


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

    def unchanged(self) -> bool:
        try:
            return self._is_unchanged()
        except (KeyError, RuntimeError, TypeError, ValueError):
            # What cannot even be compared with what it was has changed.
            return False

    def _is_unchanged(self) -> bool:
        return (
            not any(self._hooks)
            and not _has_any_global_hook()
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


class BlockRepetition:
    """`x + attention(norm(x))`, then `x + mlp(norm(x))`, as a block has just computed it on the CPU kernels.

    Made by `remember`.
    """

    def __init__(
        self,
        block: nn.Module,
        sites: Sequence[PackedWeights],
        calls: Sequence[LastCall],
        x: Tensor,
        backend: str | None,
    ) -> None:
        self._watch = Watch(list(block.modules()))
        self._sites, self._calls = sites, calls
        self._rows, self._dtype, self._backend = x.shape[1:], x.dtype, backend
        projection = calls[0].static
        self._grid, self._compute_dtype = (projection.height, projection.width), projection.dtype

    def run(self, x: Tensor, height: int, width: int) -> Tensor | None:
        """The block's output, or None when this is not a repetition: the block then has to look again."""
        if (
            x.shape[1:] != self._rows
            or (height, width) != self._grid
            or x.dtype is not self._dtype
            or compute_dtype(x) is not self._compute_dtype
            or not _repeatable(x, self._backend)
            or not self._watch.unchanged()
        ):
            return None
        projection, attention, mlp = self._calls
        q, k, v = library.repeat(projection.operator, self._sites[0], [x, *projection.weights], projection.static)
        attended = [q, k, v, *attention.weights, None, x]
        x, _ = library.repeat(attention.operator, self._sites[1], attended, attention.static)
        (x,) = library.repeat(mlp.operator, self._sites[2], [x, *mlp.weights, x], mlp.static)
        return x


def remember(
    block: nn.Module, sites: Sequence[PackedWeights], x: Tensor, backend: str | None
) -> BlockRepetition | None:
    """The call that `block` has just finished, to be repeated; None if it was not made of exactly three fused calls.

    Args:
        block: its submodules and their settings are all that its code looks at, and no dropout is at work.
        sites: of `conv_projection`, `global_attention` with the block's input as its residual, and `pointwise_mlp` with
            the sum as its residual; `forget` was called on each before the call.
        x: the block's input, `[B, N, C]`.
        backend: what the operators were asked to run on.
    """
    calls = [site.last_call for site in sites]
    found = [call for call in calls if call is not None]
    if len(found) < len(sites) or len({call.static.dtype for call in found}) > 1 or not _repeatable(x, backend):
        return None
    return BlockRepetition(block, sites, found, x, backend)


def _repeatable(x: Tensor, backend: str | None) -> bool:
    return type(x) is Tensor and x.is_contiguous() and dispatch.repeats_on_cpu(x, backend)
