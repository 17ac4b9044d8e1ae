"""Weights from files and state dicts, with a report of what fitted."""

from __future__ import annotations

import os
import pickle
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

WRAPPERS = ("model_ema", "model", "state_dict", "model_state")
PREFIXES = ("module.", "_orig_mod.")
_SHOWN = 5
# Of zip archives and of pickles, which torch.save writes.
_BEGINNINGS = (b"PK", b"\x80")


class CheckpointError(ValueError):
    """A checkpoint that cannot be read, or that does not fit the model."""


class Conversion(NamedTuple):
    """A state dict under the model's own names.

    Attributes:
        source: whose names the checkpoint used, such as `"official"` or `"transformers"`.
        state_dict: the converted state dict.
        notes: what the user should know about weights from this source.
    """

    source: str
    state_dict: dict[str, Tensor]
    notes: list[str] = []


@dataclass
class CheckpointReport:
    """What `load_checkpoint` did.

    Attributes:
        source: whose names the checkpoint used.
        wrapper: names of the entries the state dict was found under, outermost first.
        loaded: names of the entries now in the model.
        missing: entries of the model that the checkpoint lacks; they keep their values.
        unexpected: entries of the checkpoint that the model lacks.
        mismatching: shapes `(checkpoint's, model's)` of the entries that differ there; they keep their values.
        left_out: entries of the full model, such as the classifier, that this model was built without.
        notes: what the user should know about weights from this source; also issued as warnings.
    """

    source: str
    wrapper: tuple[str, ...] = ()
    loaded: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    mismatching: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def complete(self) -> bool:
        """Whether every entry of model and checkpoint found its counterpart."""
        return not (self.missing or self.unexpected or self.mismatching)

    def __str__(self) -> str:
        where = f" under {'.'.join(self.wrapper)}" if self.wrapper else ""
        lines = [f"{len(self.loaded)} entries loaded ({self.source} names{where})"]
        shapes = [f"{name} {theirs} here {ours}" for name, (theirs, ours) in self.mismatching.items()]
        for what, names in (
            ("missing in the checkpoint", self.missing),
            ("unknown to the model", self.unexpected),
            ("of another shape", shapes),
            ("left out of this model", self.left_out),
        ):
            if names:
                more = ", ..." if len(names) > _SHOWN else ""
                lines.append(f"  {len(names)} {what}: {', '.join(names[:_SHOWN])}{more}")
        return "\n".join(lines + [f"  note: {note}" for note in self.notes])


def load_checkpoint(
    model: nn.Module, source: str | os.PathLike[str] | Mapping[str, Any], *, strict: bool = True
) -> CheckpointReport:
    """Load weights into a model built by `create_model`.

    The state dict may lie inside a training checkpoint, under `model_ema`, `model`, `state_dict` or `model_state` (the
    first of these that is there), and may carry the prefixes of `DistributedDataParallel` and `torch.compile`. Official
    names and those of transformers and timm are understood. Values are cast to the dtype of the model's entries. A
    batch norm's `num_batches_tracked` may be absent on either side.

    Args:
        model: filled in place; untouched when an error is raised.
        source: a file of `torch.save` or safetensors, or a state dict (or checkpoint dict) in memory. Files are read
            without running code from them.
        strict: raise when anything is missing, unexpected or of another shape. Otherwise what fits is loaded and the
            rest is reported, which is the way to start from a checkpoint with another number of classes.

    Returns:
        What was loaded and what was not.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: the file is broken, holds more than tensors and plain values, or does not fit the model.
        TypeError: `source` is neither a path nor a mapping.
    """
    if isinstance(source, Mapping):
        name, content = "the given state dict", source
    elif isinstance(source, (str, os.PathLike)):
        name, content = str(Path(source)), _read(Path(source))
    else:
        raise TypeError(f"source: expected a path or a state dict, got {type(source).__name__}")
    tensors, wrapper = _unwrap(content, name)
    convert = getattr(model, "convert_checkpoint", None)
    conversion = Conversion("official", tensors) if convert is None else convert(tensors)
    report = _compare(model, conversion, wrapper)
    if not report.loaded:
        raise CheckpointError(f"{name} does not fit the model: none of its entries does\n{report}")
    if strict and not report.complete:
        raise CheckpointError(f"{name} does not fit the model; strict=False loads what does\n{report}")
    model.load_state_dict({key: conversion.state_dict[key] for key in report.loaded}, strict=False)
    for note in report.notes:
        warnings.warn(note, stacklevel=2)
    return report


def _read(path: Path) -> Any:
    if not path.exists():
        raise FileNotFoundError(f"no checkpoint file {path}")
    if path.is_dir():
        raise CheckpointError(f"{path} is a directory, expected a checkpoint file")
    try:
        return _read_safetensors(path) if _is_safetensors(path) else _read_torch(path)
    except CheckpointError:
        raise
    except Exception as error:
        # Broken files fail in many ways inside the readers; to the caller they all mean the same.
        raise CheckpointError(
            f"{path} is no checkpoint, or cut off or damaged ({_what_is_wrong(path, error)})"
        ) from error


def _what_is_wrong(path: Path, error: Exception) -> str:
    """Without the reader's advice: torch's is to load the file in a way that may run code in it."""
    with path.open("rb") as file:
        start = file.read(16)
    if not start:
        return "it is empty"
    if isinstance(error, pickle.UnpicklingError) and not start.startswith(_BEGINNINGS):
        return f"it starts with {start!r}, as no file of torch.save or safetensors does"
    text = " ".join(str(error).split())
    _, _, reason = text.partition("WeightsUnpickler error: ")
    return (reason or text).partition(". ")[0].partition(" Check the documentation")[0] or "it ends early"


def _is_safetensors(path: Path) -> bool:
    """A safetensors file starts with the length of its header, eight bytes, and the header is JSON."""
    with path.open("rb") as file:
        return file.read(9)[8:] == b"{"


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        from safetensors.torch import load_file
    except ImportError as error:
        raise CheckpointError(f"{path} is a safetensors file, and the package safetensors is not installed") from error
    return load_file(path)


def _read_torch(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        refused = re.search(r"GLOBAL (\S+)", str(error))
        if refused is None:
            raise
        raise CheckpointError(
            f"{path} holds {refused[1]} besides tensors and plain values; reading that could run code, so it is "
            "refused. If you trust the file, load it yourself and save its state dict alone"
        ) from error


def _unwrap(content: Any, name: str) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """The innermost state dict, its names without prefixes of wrapping modules, and where it was."""
    path: list[str] = []
    while isinstance(content, Mapping) and (wrapper := next((w for w in WRAPPERS if w in content), None)):
        path.append(wrapper)
        content = content[wrapper]
    if not isinstance(content, Mapping) or not content:
        raise CheckpointError(f"{name} holds no state dict, but {_describe(content)}{_under(path)}")
    strange = next((key for key, value in content.items() if not isinstance(value, Tensor)), None)
    if strange is not None:
        raise CheckpointError(
            f"{name} holds no state dict: {strange!r}{_under(path)} is {_describe(content[strange])}, "
            f"expected a tensor; a state dict inside a checkpoint is looked for under {', '.join(WRAPPERS)}"
        )
    return {_without_prefixes(key): value for key, value in content.items()}, tuple(path)


def _under(path: list[str]) -> str:
    return f" under {'.'.join(path)}" if path else ""


def _describe(value: object) -> str:
    return "an empty one" if isinstance(value, Mapping) and not value else f"a {type(value).__name__}"


def _without_prefixes(key: str) -> str:
    while prefix := next((p for p in PREFIXES if key.startswith(p)), None):
        key = key.removeprefix(prefix)
    return key


def _compare(model: nn.Module, conversion: Conversion, wrapper: tuple[str, ...]) -> CheckpointReport:
    """Which entries fit; nothing is loaded yet."""
    report = CheckpointReport(conversion.source, wrapper, notes=list(conversion.notes))
    ours = model.state_dict()
    left_out: tuple[str, ...] = getattr(model, "left_out", ())
    for key, value in conversion.state_dict.items():
        if key not in ours:
            if key.startswith(left_out):
                report.left_out.append(key)
            elif not _is_counter(key):
                report.unexpected.append(key)
        elif value.shape != ours[key].shape:
            report.mismatching[key] = (tuple(value.shape), tuple(ours[key].shape))
        else:
            report.loaded.append(key)
    report.missing = [key for key in ours if key not in conversion.state_dict and not _is_counter(key)]
    return report


def _is_counter(key: str) -> bool:
    return key.endswith(".num_batches_tracked")
