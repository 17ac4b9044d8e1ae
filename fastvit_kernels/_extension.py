"""Loads the compiled kernels and keeps the reason when that is not possible."""

from __future__ import annotations

import json
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

PARTS = ("cpu", "cuda")


@dataclass(frozen=True)
class Part:
    """One compiled library: `path` when its file exists, `problem` when it could not be loaded."""

    name: str
    path: Path | None
    problem: str | None

    @property
    def loaded(self) -> bool:
        return self.problem is None

    @property
    def state(self) -> Literal["loaded", "not built", "built for another environment"]:
        if self.loaded:
            return "loaded"
        return "not built" if self.path is None else "built for another environment"


def _find(name: str) -> Path | None:
    # An editable install has the libraries in site-packages and the sources elsewhere: ask the package, not __file__.
    import fastvit_kernels

    return next((p for d in fastvit_kernels.__path__ if (p := Path(d) / name).exists()), None)


def _why_not_built(name: str) -> str:
    metadata = build_metadata()
    if not metadata:
        return "not built: these sources were never installed (pip install --no-build-isolation .)"
    return f"not built: {metadata.get(f'{name}_left_out') or f'the build left no {name} library'}"


def _load(name: str) -> Part:
    path = _find(f"_fk_{name}.so")
    if path is None:
        return Part(name, None, _why_not_built(name))
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        built_with = build_metadata().get("torch", "an unknown version")
        problem = f"built for another environment (torch {built_with}, this is {torch.__version__}): {error}"
        warnings.warn(f"fastvit_kernels runs without its {name} kernels: {problem}", RuntimeWarning, stacklevel=3)
        return Part(name, path, problem)
    return Part(name, path, None)


def build_metadata() -> dict[str, str]:
    """What the compiled kernels were built with, as recorded at build time; empty when nothing was built."""
    path = _find("_build.json")
    return dict(json.loads(path.read_text())) if path is not None else {}


parts: dict[str, Part] = {}


def load() -> None:
    """Load every compiled part once; later calls do nothing."""
    for name in PARTS:
        if name not in parts:
            parts[name] = _load(name)
