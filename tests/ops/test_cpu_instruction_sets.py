"""Every instruction set that this machine can run keeps the numerics rule, not only the best one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
FILES = sorted(HERE.glob("test_*.py"))
ORDER = ("generic", "avx2", "avx512", "avx512bf16")


def chosen(wish: str) -> str:
    """The instruction set a process runs with this FASTVIT_CPU_ISA ("": the machine's best)."""
    script = "import torch, fastvit_kernels; print(torch.ops.fastvit.cpu_isa())"
    environment = {**os.environ, "FASTVIT_CPU_ISA": wish}
    run = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    return run.stdout.strip()


LOWER = ORDER[: ORDER.index(chosen(""))]


@pytest.mark.parametrize("isa", LOWER or ("generic",))
def test_forward_keeps_the_numerics_rule(isa):
    assert chosen(isa) == isa
    contracts = [file for file in FILES if "Contract" in file.read_text() and file != Path(__file__)]
    assert len(contracts) >= 4
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "test_forward and cpu", *contracts],
        env={**os.environ, "FASTVIT_CPU_ISA": isa},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-4000:]
    passed = int(run.stdout.strip().splitlines()[-1].split(" passed")[0].split()[-1])
    assert passed > 100
