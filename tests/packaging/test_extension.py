"""A library that is there, one that was never built, one that was built for something else."""

from __future__ import annotations

import json

import pytest

import fastvit_kernels
from fastvit_kernels import _extension


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package directory without compiled parts, in place of the real one."""
    monkeypatch.setattr(fastvit_kernels, "__path__", [str(tmp_path)])
    return tmp_path


def test_loaded():
    part = _extension.parts["cpu"]
    assert (part.loaded, part.state) == (True, "loaded")
    assert part.path.name == "_fk_cpu.so"


def test_never_installed(package):
    part = _extension._load("cpu")
    assert (part.loaded, part.state, part.path) == (False, "not built", None)
    assert "never installed" in part.problem


def test_left_out(package):
    (package / "_build.json").write_text(json.dumps({"cuda_left_out": "no working nvcc at build time"}))
    part = _extension._load("cuda")
    assert part.state == "not built"
    assert part.problem == "not built: no working nvcc at build time"


def test_built_for_another_environment(package):
    (package / "_build.json").write_text(json.dumps({"torch": "1.0"}))
    (package / "_fk_cpu.so").write_bytes(b"not a library")
    with pytest.warns(RuntimeWarning, match="runs without its cpu kernels"):
        part = _extension._load("cpu")
    assert (part.loaded, part.state, part.path) == (False, "built for another environment", package / "_fk_cpu.so")
    assert "torch 1.0" in part.problem
