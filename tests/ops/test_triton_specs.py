"""Every Triton kernel has a spec beside it, by which it is compiled for GPUs that need not be there."""

from __future__ import annotations

import dis
import inspect
from collections.abc import Iterator
from concurrent.futures import Executor
from types import CodeType, ModuleType
from typing import Any

import pytest
from triton_fits import check_fits, check_products
from triton_specs import TARGETS, WITH_SPECS, compile_specs, is_kernel, modules, specs_of

from fastvit_kernels.testing.triton_aot import compiling_process


@pytest.fixture(scope="module")
def process():
    with compiling_process() as pool:
        yield pool


@pytest.mark.parametrize(("dtype", "architecture"), TARGETS)
@pytest.mark.parametrize("module", WITH_SPECS)
def test_kernels_fit_the_gpu(process: Executor, module: str, dtype: str, architecture: str) -> None:
    """No register is spilled, shared memory suffices, and tensor cores multiply bf16 and fp16."""
    for kernel in process.submit(compile_specs, module, dtype, architecture).result():
        check_fits(kernel, architecture)
        if dtype != "float32":
            check_products(kernel, architecture)


def test_every_launched_kernel_has_a_spec_beside_it() -> None:
    launched = {place(kernel) for module in modules() for kernel in launched_in(module)}
    specified = [(module.__name__, spec.kernel.__name__) for module in modules() for spec in specs_of(module)]
    assert len(launched) > 40
    assert sorted(specified) == sorted(launched)


def place(kernel: Any) -> tuple[str, str]:
    """The module that defines a kernel, and its name there."""
    return kernel.fn.__module__, kernel.__name__


def launched_in(module: ModuleType) -> Iterator[Any]:
    """The kernels that a module's functions name, but for those that Triton compiles: they call, and launch nothing."""

    def names(code: CodeType) -> Iterator[str]:
        yield from (i.argval for i in dis.get_instructions(code) if i.opname == "LOAD_GLOBAL")
        for constant in code.co_consts:
            if isinstance(constant, CodeType) and not is_kernel(getattr(module, constant.co_name, None)):
                yield from names(constant)

    for name in names(compile(inspect.getsource(module), module.__name__, "exec")):
        if is_kernel(getattr(module, name, None)):
            yield getattr(module, name)
