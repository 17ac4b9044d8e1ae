"""Compiles what the Triton launchers would launch, for GPUs that need not be there."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, nullcontext
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

from fastvit_kernels.ops import triton_support

# Shared memory that a thread block may have, and registers (of 32 bits) of a multiprocessor.
SHARED_MEMORY = {"sm_80": 163 * 1024, "sm_89": 99 * 1024, "sm_90": 227 * 1024, "gfx942": 64 * 1024}
REGISTERS = 64 * 1024


class Launch(NamedTuple):
    """What decides whether Triton's just-in-time compiler has compiled a launch before.

    Attributes:
        name: of the kernel.
        key: types and properties of its arguments, values of the constant ones, and the options.
    """

    name: str
    key: str


class Compiled(NamedTuple):
    """A kernel as compiled for one architecture.

    Attributes:
        name: of the kernel.
        key: equal for launches that share the compiled kernel.
        registers: of one thread.
        spilled: what does not fit them: bytes of stack (NVIDIA) or spilled vector registers (AMD) of one thread.
        shared: bytes of shared memory.
        threads: in a block.
        assembly: PTX or AMDGCN.
    """

    name: str
    key: str
    registers: int
    spilled: int
    shared: int
    threads: int
    assembly: str


@contextmanager
def compiling_process(processes: int = 1, folder: Path | None = None) -> Iterator[ProcessPoolExecutor]:
    """A process, or several, in which `compile_launches` works, whether or not this one interprets its kernels.

    Triton decides between the two when it is imported, and running its interpreter leaves parts of `triton.language`
    replaced.

    Args:
        processes: how many.
        folder: where they find Triton; None for the installed one.
    """
    context = get_context("spawn")
    pool = ProcessPoolExecutor(processes, context, initializer=_compile_only, initargs=(folder,))
    try:
        yield pool
    finally:
        # Nobody waits for results any more.
        pool.shutdown(cancel_futures=True)


def _compile_only(folder: Path | None) -> None:
    os.environ.pop("TRITON_INTERPRET", None)
    if folder is not None:
        sys.path.insert(0, str(folder))
    triton_support.interpreting()


def compile_launches(
    call: Callable[[], Any], architecture: str, wanted: Callable[[Launch], bool] = lambda launch: True
) -> list[Compiled]:
    """Compile every kernel that `call` launches, as Triton's just-in-time compiler would at the first launch.

    Args:
        call: runs an operator's `launch` on meta tensors.
        architecture: `"sm_80"`, `"sm_90"`, `"gfx942"`, ...
        wanted: whether a launch is compiled.

    Returns:
        One entry for each wanted launch, in order. What Triton's cache on disk holds is not compiled again.

    Raises:
        RuntimeError: this process interprets its kernels; see `compiling_process`.
    """
    read = _read_cubin if architecture.startswith("sm_") else _read_amdgcn
    found: list[Compiled] = []

    def submit(kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], options: dict[str, Any]) -> None:
        if wanted(_launch(kernel, args, options, architecture)):
            found.append(read(kernel.warmup(*args, grid=grid, **options)))

    with _submitting(submit, architecture):
        call()
    return found


def launches(call: Callable[[], Any], architecture: str) -> list[Launch]:
    """As `compile_launches`, without compiling anything."""
    found: list[Launch] = []

    def submit(kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], options: dict[str, Any]) -> None:
        found.append(_launch(kernel, args, options, architecture))

    with _submitting(submit, architecture):
        call()
    return found


def _launch(kernel: Any, args: tuple[Any, ...], options: dict[str, Any], architecture: str) -> Launch:
    # The last of what a kernel keeps for a device, which `_Driver` names after its architecture.
    *_, binder = kernel.device_caches[architecture]
    _, specialization, rest = binder(*args, **options)
    return Launch(kernel.__name__, f"{specialization} {rest}")


@contextmanager
def _submitting(submit: Callable[..., None], architecture: str) -> Iterator[None]:
    """Launches come here, as on a device of this architecture."""
    if triton_support.interpreting():
        raise RuntimeError("TRITON_INTERPRET: expected it to be unset before Triton is imported, got 1")
    with (
        mock.patch.object(triton_support, "submit", submit),
        mock.patch.object(triton_support, "architecture", lambda device: architecture),
        mock.patch.object(triton_support, "_guard", lambda device: nullcontext()),
        _driver(architecture),
    ):
        yield


class _Driver:
    """The part of a Triton driver that the compiler asks for: a device of some architecture."""

    def __init__(self, architecture: str) -> None:
        from triton.backends.compiler import GPUTarget

        if architecture.startswith("sm_"):
            self.target = GPUTarget("cuda", int(architecture.removeprefix("sm_")), 32)
        else:
            self.target = GPUTarget("hip", architecture, 64)

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> Any:
        # A kernel keeps what was compiled by device.
        return self.target.arch

    def get_current_stream(self, device: Any) -> int:
        return 0


@contextmanager
def _driver(architecture: str) -> Iterator[None]:
    from triton.runtime import driver

    driver.set_active(_Driver(architecture))
    try:
        yield
    finally:
        # The next launch looks for a real one again.
        driver.set_active(None)


def _read_cubin(compiled: Any) -> Compiled:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        usage = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    metadata = compiled.metadata
    return Compiled(
        metadata.name,
        compiled.hash,
        _number(r"\bREG:(\d+)", usage),
        _number(r"\bSTACK:(\d+)", usage),
        metadata.shared,
        metadata.num_warps * 32,
        compiled.asm["ptx"],
    )


def _read_amdgcn(compiled: Any) -> Compiled:
    text, metadata = compiled.asm["amdgcn"], compiled.metadata
    return Compiled(
        metadata.name,
        compiled.hash,
        _number(r"\.vgpr_count:\s*(\d+)", text),
        _number(r"\.vgpr_spill_count:\s*(\d+)", text),
        metadata.shared,
        metadata.num_warps * 64,
        text,
    )


def _number(pattern: str, text: str) -> int:
    match = re.search(pattern, text)
    assert match is not None, text
    return int(match[1])
