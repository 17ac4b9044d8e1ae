"""The oldest Triton that is supported compiles every kernel, too, without spilling.

Here at one size each. `make test ARGS=tests/ops/test_triton_compilation.py TEST_TRITON=.venv/oldest-triton` takes all.
"""

from __future__ import annotations

import re
import sys
from concurrent.futures import Executor
from importlib.metadata import requires
from pathlib import Path

import pytest
from triton_calls import OPERATORS, PRECISIONS, Stage
from triton_fits import check_fits, check_products
from triton_specs import TARGETS, WITH_SPECS, compile_specs

from fastvit_kernels.testing.triton_aot import Compiled, compile_launches, compiling_process

# `make test` installs it there.
FOLDER = Path(sys.prefix) / "oldest-triton"


def triton_version() -> str:
    import triton

    return str(triton.__version__)


def compile_windows(stage: Stage, architecture: str) -> list[Compiled]:
    """The launches of `local_attention` in fp32, whose registers are the scarcest."""
    return [
        kernel
        for operator in ("local_attention", "local_attention of rows that are added")
        for kernel in compile_launches(OPERATORS[operator](stage, PRECISIONS["float32"]).forward, architecture)
    ]


@pytest.fixture(scope="module")
def process():
    assert FOLDER.is_dir(), f"{FOLDER} is missing: `make test` installs Triton there"
    with compiling_process(folder=FOLDER) as pool:
        yield pool


def test_it_is_the_oldest(process: Executor) -> None:
    (requirement,) = {r for r in requires("fastvit-kernels") or [] if re.match(r"triton\b", r)}
    oldest = re.search(r">=\s*([\d.]+)", requirement)
    assert oldest is not None and process.submit(triton_version).result().startswith(f"{oldest[1]}.")


@pytest.mark.parametrize(("dtype", "architecture"), TARGETS)
def test_every_kernel_fits_the_gpu(process: Executor, dtype: str, architecture: str) -> None:
    for module in WITH_SPECS:
        for kernel in process.submit(compile_specs, module, dtype, architecture).result():
            check_fits(kernel, architecture)
            if dtype != "float32":
                check_products(kernel, architecture)


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
@pytest.mark.parametrize("stage", [Stage(64, 1, window=8), Stage(96, 2), Stage(46, 1, window=8, pad="zero")])
def test_windows_fit_the_gpu_in_fp32(process: Executor, stage: Stage, architecture: str) -> None:
    for kernel in process.submit(compile_windows, stage, architecture).result():
        check_fits(kernel, architecture)
