"""With which sources and packages a measurement was made."""

from __future__ import annotations

import hashlib
import subprocess
from importlib import metadata
from pathlib import Path

import fastvit_kernels.bench
import fastvit_kernels.models
from fastvit_kernels.ops import tuning

_HASHED = (".py", ".json", ".so")
PACKAGES = ("torch", "onnxruntime", "openvino", "transformers")


def version(package: str) -> str:
    """The installed version, empty for none."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def sources() -> str:
    """Stands for the exact files of this package, compiled ones included, whether or not there is a checkout."""
    digest = hashlib.sha256()
    for package in (fastvit_kernels, fastvit_kernels.models, fastvit_kernels.bench):
        for folder in map(Path, package.__path__):
            # The names in order: what a folder lists first depends on the file system.
            for path in sorted(path for path in folder.rglob("*") if path.suffix in _HASHED and path.is_file()):
                digest.update(f"{path.relative_to(folder)}\0".encode())
                digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def tuned() -> str:
    """Stands for what the tuning entries in force decide, tiles and the order of backends; empty for no entries.

    Measured anew with the same outcome they are the same.
    """
    current = tuning.current()
    decisions = [
        *(f"{entry.place} {entry.config}" for entry in current.launches if not entry.failed),
        *(f"{entry.key} {entry.channels} {entry.order}" for entry in current.preferences),
    ]
    return hashlib.sha256("\n".join(decisions).encode()).hexdigest()[:12] if decisions else ""


def commit() -> str:
    """The commit of these sources, with `-dirty` behind it when tracked files differ; empty outside a checkout."""
    here = Path(__file__).resolve()

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", "-C", str(here.parent), *arguments], capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else ""

    try:
        # A package installed inside some other project's checkout must not report that project's commit.
        if not git("ls-files", "--error-unmatch", here.name):
            return ""
        return git("describe", "--always", "--dirty", "--exclude", "*", "--abbrev=12")
    except FileNotFoundError:
        return ""
