"""With which sources and packages a measurement was made."""

from __future__ import annotations

import subprocess
from importlib import metadata
from pathlib import Path

PACKAGES = ("torch", "onnxruntime", "openvino", "transformers")


def version(package: str) -> str:
    """The installed version, empty for none."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


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
