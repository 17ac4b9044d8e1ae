"""The products of `csrc/cpu/isa/amx.h` with tile registers in plain C++: every processor with AVX-512 runs them.

Where AMX itself is, all other tests run it.
"""

from __future__ import annotations

import os
import shlex
import subprocess
from pathlib import Path

import torch

import fastvit_kernels  # noqa: F401  loads the kernels

HERE = Path(__file__).parent
SOURCES = HERE.parents[1] / "csrc" / "cpu"
FLAGS = (
    *("-std=c++17", "-O1", "-g", "-ffp-contract=fast", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"),
    *("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mavx512bf16"),
)

if torch.ops.fastvit.cpu_isa() in ("avx512bf16", "amx"):

    def test_products_of_any_shape(tmp_path: Path) -> None:
        program = tmp_path / "products"
        compiler = shlex.split(os.environ.get("CXX", "c++"))
        replaced = f'-DFK_AMX_REGISTERS="{HERE / "amx_registers.h"}"'
        command = [*compiler, *FLAGS, replaced, f"-I{SOURCES}", str(HERE / "amx_products.cpp"), "-o", str(program)]
        built = subprocess.run(command, capture_output=True, text=True)
        assert built.returncode == 0, built.stderr[-4000:]
        done = subprocess.run([program], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr[-4000:]
        assert done.stdout == "1200 products, in parts or prepared: some\n"
