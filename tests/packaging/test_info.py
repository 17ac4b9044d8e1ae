"""What `info()` reports, and the reasons for what is missing."""

from __future__ import annotations

import os
import subprocess
import sys

import torch

import fastvit_kernels
from fastvit_kernels import _extension
from fastvit_kernels.ops import triton_support


def test_this_machine():
    info = fastvit_kernels.info()
    assert info.torch == torch.__version__
    assert info.threads == torch.get_num_threads()
    assert info.build == _extension.build_metadata()
    assert list(info.backends) == ["triton", "cuda", "cpu", "reference", "sdpa"]
    assert info.backends["cpu"].usable and info.backends["reference"].usable
    assert info.processor and info.cores >= 1
    assert info.isa.detail.split()[0] in info.build["cpu_isas"].split()
    assert info.backends["cuda"].usable <= torch.cuda.is_available()


def test_table_has_everything():
    info = fastvit_kernels.info()
    table = str(info)
    for value in (info.version, info.processor, info.python, info.torch, info.isa.detail, info.triton.detail):
        assert value in table
    for name, availability in info.backends.items():
        assert f"{name} " in table and str(availability) in table


def test_default_backend_is_the_choice_in_force():
    with fastvit_kernels.use_backend("reference"):
        assert fastvit_kernels.info().default_backend == "reference"


def test_missing_part_gives_its_reason(monkeypatch):
    problem = "not built: some reason"
    monkeypatch.setitem(_extension.parts, "cpu", _extension.Part("cpu", None, problem))
    monkeypatch.setitem(_extension.parts, "cuda", _extension.Part("cuda", None, problem))
    info = fastvit_kernels.info()
    assert not info.backends["cpu"].usable and info.backends["cpu"].detail == problem
    assert not info.backends["cuda"].usable and problem in info.backends["cuda"].detail


def test_nothing_compiled_is_said(monkeypatch):
    monkeypatch.setattr(_extension, "build_metadata", dict)
    assert "nothing compiled" in str(fastvit_kernels.info())


def test_triton_that_is_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    info = fastvit_kernels.info()
    assert not info.triton.usable and info.backends["triton"] == info.triton


def test_triton_that_cannot_run_here(monkeypatch):
    monkeypatch.setattr(triton_support, "machine_problem", lambda device: f"nothing runs on {device.type}")
    backend = fastvit_kernels.info().backends["triton"]
    assert not backend.usable and "nothing runs on" in backend.detail


def _isa(wish):
    script = "import fastvit_kernels; print(fastvit_kernels.info().isa.detail)"
    told = subprocess.run(
        [sys.executable, "-c", script], env={**os.environ, "FASTVIT_CPU_ISA": wish}, capture_output=True, text=True
    )
    assert told.returncode == 0, told.stderr
    return told.stdout.strip()


def test_lowered_instruction_set():
    assert _isa("generic") == "generic (FASTVIT_CPU_ISA)"


def test_unknown_instruction_set_is_said():
    assert "FASTVIT_CPU_ISA=avx7 is not among those" in _isa("avx7")
