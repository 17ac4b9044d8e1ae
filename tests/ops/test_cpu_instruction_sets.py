"""Every instruction set that this machine can run keeps the numerics rule, not only the best one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastvit_kernels  # noqa: F401  loads the kernels

HERE = Path(__file__).parent
FILES = sorted(HERE.glob("test_*.py"))
ORDER = ("generic", "avx2", "avx512", "avx512bf16", "amx")
# Below what this process runs, which is the machine's best unless the environment says otherwise.
LOWER = ORDER[: ORDER.index(torch.ops.fastvit.cpu_isa())]
ISAS = LOWER or ("generic",)
# The kernels choose at their first call, once for a process.
PROGRAM = """
import sys
import pytest, torch, fastvit_kernels
assert torch.ops.fastvit.cpu_isa() == sys.argv[1], torch.ops.fastvit.cpu_isa()
sys.exit(pytest.main(sys.argv[2:]))
"""


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    """By instruction set, a process that runs the contracts' tests of outputs and gradients with it, and its output."""
    contracts = [file for file in FILES if "Contract" in file.read_text() and file != Path(__file__)]
    assert len(contracts) >= 4
    chosen = "((test_forward or test_gradients) and cpu) or test_values_and_derivatives"
    options = ["-q", "-p", "no:cacheprovider", "-k", chosen]
    files = [*contracts, Path(__file__).with_name("test_activations.py")]
    started = {}
    for isa in ISAS:
        output = tmp_path_factory.mktemp(isa) / "output"
        with output.open("w") as file:
            command = [sys.executable, "-c", PROGRAM, isa, *options, *files]
            environment = {**os.environ, "FASTVIT_CPU_ISA": isa}
            process = subprocess.Popen(command, env=environment, stdout=file, stderr=subprocess.STDOUT)
        started[isa] = process, output
    yield started
    for process, _ in started.values():
        process.kill()
        process.wait()


@pytest.mark.parametrize("isa", ISAS)
def test_forward_and_gradients_keep_the_numerics_rule(isa, processes):
    process, output = processes[isa]
    status, said = process.wait(), output.read_text()
    assert status == 0, said[-4000:]
    passed = int(said.strip().splitlines()[-1].split(" passed")[0].split()[-1])
    assert passed > 100
