"""Where and with what a measurement was made."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from importlib import metadata
from pathlib import Path

PACKAGES = ("torch", "onnxruntime", "openvino", "transformers")


def cpu_model() -> str:
    """The processor's own name for itself, the architecture where it has none."""
    path = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*:\s*(.+)$", path.read_text(), re.MULTILINE) if path.exists() else None
    return found.group(1).strip() if found else platform.processor() or platform.machine()


def cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


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
