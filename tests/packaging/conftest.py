"""One source distribution and one wheel built from it, shared by all tests here."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[2]


class Build(NamedTuple):
    sdist: Path
    wheel: Path
    objects: dict[str, Path]
    """Object files by the stem of their source."""


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    """Output of a command; fails the test with everything it said otherwise."""
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True
    )
    assert done.returncode == 0, f"{command} in {cwd}:\n{done.stdout}\n{done.stderr}"
    return done.stdout


def _only(paths: list[Path]) -> Path:
    assert len(paths) == 1, paths
    return paths[0]


@pytest.fixture(scope="session")
def root() -> Path:
    return ROOT


@pytest.fixture(scope="session")
def execute() -> Callable[..., str]:
    return run


@pytest.fixture(scope="session")
def build(tmp_path_factory: pytest.TempPathFactory) -> Build:
    """The wheel comes from the unpacked source distribution, without build isolation, network or CUDA."""
    folder = tmp_path_factory.mktemp("dist")
    hook = "import sys; from scikit_build_core.build import build_sdist; build_sdist(sys.argv[1])"
    run(sys.executable, "-c", hook, folder, cwd=ROOT)
    sdist = _only(list(folder.glob("*.tar.gz")))
    objects = folder / "objects"
    run(
        *(sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "--no-index"),
        *("--config-settings", f"build-dir={objects}", "--wheel-dir", folder, sdist),
        cwd=folder,
        FASTVIT_CUDA="0",
    )
    wheel = _only(list(folder.glob("*.whl")))
    return Build(sdist, wheel, {path.name.split(".")[0]: path for path in objects.rglob("*.cpp.o")})
