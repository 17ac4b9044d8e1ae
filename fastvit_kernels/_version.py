"""The version, as it is installed."""

from __future__ import annotations

from importlib import metadata


def _installed() -> str:
    try:
        return metadata.version("fastvit-kernels")
    except metadata.PackageNotFoundError:
        return "(not installed)"


__version__ = _installed()
