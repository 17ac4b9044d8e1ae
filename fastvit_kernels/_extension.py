"""Loads the compiled kernels and keeps the reason when that is not possible."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

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


def _package_directories() -> list[Path]:
    # An editable install keeps the libraries in site-packages and the sources elsewhere: ask the package, not __file__.
    import fastvit_kernels

    return [Path(directory) for directory in fastvit_kernels.__path__]


def _load(name: str) -> Part:
    path = next((p for d in _package_directories() if (p := d / f"_fk_{name}.so").exists()), None)
    if path is None:
        return Part(name, None, f"not built: the {name} kernels were left out when this package was built")
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        return Part(name, path, f"built for another environment: {error}")
    return Part(name, path, None)


def build_metadata() -> dict[str, str]:
    """What the compiled kernels were built with, as recorded at build time."""
    for directory in _package_directories():
        path = directory / "_build.json"
        if path.exists():
            return dict(json.loads(path.read_text()))
    return {}


parts: dict[str, Part] = {}


def load() -> None:
    """Load every compiled part once; later calls do nothing."""
    for name in PARTS:
        if name not in parts:
            parts[name] = _load(name)
