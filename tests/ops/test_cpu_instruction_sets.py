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
ORDER = ("generic", "avx2", "avx512", "avx512bf16")
# Below what this process runs, which is the machine's best unless the environment says otherwise.
LOWER = ORDER[: ORDER.index(torch.ops.fastvit.cpu_isa())]
# The kernels choose at their first call, once for a process.
PROGRAM = """
import sys
import pytest, torch, fastvit_kernels
assert torch.ops.fastvit.cpu_isa() == sys.argv[1], torch.ops.fastvit.cpu_isa()
sys.exit(pytest.main(sys.argv[2:]))
"""


@pytest.mark.parametrize("isa", LOWER or ("generic",))
def test_forward_keeps_the_numerics_rule(isa):
    contracts = [file for file in FILES if "Contract" in file.read_text() and file != Path(__file__)]
    assert len(contracts) >= 4
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM, isa, "-q", "-p", "no:cacheprovider", "-k", "test_forward and cpu", *contracts],
        env={**os.environ, "FASTVIT_CPU_ISA": isa},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-4000:]
    passed = int(run.stdout.strip().splitlines()[-1].split(" passed")[0].split()[-1])
    assert passed > 100
