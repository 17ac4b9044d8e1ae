"""The CUDA kernels compiled for the host with sanitizers, and the process that runs them."""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import mmap
import os
import pickle
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NAMESPACE = "fastvit_emulated"
# Bytes of shared memory of a block.
A100 = 163 * 1024
_PROCESSORS = 108
_FLAGS = (
    *("-std=c++17", "-O1", "-g1", "-fPIC", "-fvisibility=hidden", "-fno-strict-aliasing", "-ffp-contract=off"),
    *("-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"),
    *("-DTORCH_TARGET_VERSION=0x020a000000000000ULL", f"-DFK_LIBRARY={NAMESPACE}", "-DFK_DISPATCH_KEY=CPU"),
)
_SANITIZE = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer")
# Fresh memory is NaN in every dtype; what Python never frees is not the kernels' concern.
_SANITIZERS = {"ASAN_OPTIONS": "detect_leaks=0:max_malloc_fill_size=10000000:malloc_fill_byte=255"}


class EmulatorError(RuntimeError):
    """The process died: what a sanitizer or the emulator said."""


def _compiler() -> list[str]:
    return shlex.split(os.environ.get("CXX", "c++"))


def _run(*command: str | Path) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    assert done.returncode == 0, f"{command}:\n{done.stdout}{done.stderr}"
    return done.stdout


def build(folder: Path) -> tuple[Path, Path]:
    """Compile csrc/cuda with the emulator, and the emulator's own test; two compilers at a time."""
    torch_folder = Path(importlib.util.find_spec("torch").origin).parent
    kernels, emulator = ROOT / "csrc" / "cuda", ROOT / "tests" / "cuda" / "emulator"
    # The emulator has a stream of its own.
    sources = [*kernels.glob("*.cu"), *(path for path in kernels.glob("*.cpp") if path.name != "stream.cpp")]
    sources += emulator.glob("*.cpp")
    sources.sort(key=lambda path: -path.stat().st_size)
    includes = ("-I", kernels, "-I", emulator, "-isystem", torch_folder / "include")

    def compile_one(source: Path) -> Path:
        target = folder / f"{source.parent.name}_{source.name}.o"
        # What faces torch touches no tensor's memory, and would take a third of the time.
        sanitize = () if source.parent == kernels and '#include "support.h"' in source.read_text() else _SANITIZE
        _run(*_compiler(), *_FLAGS, *sanitize, *includes, "-x", "c++", "-c", source, "-o", target)
        return target

    with ThreadPoolExecutor(max_workers=2) as pool:
        objects = dict(zip(sources, pool.map(compile_one, sources), strict=True))
    faults = emulator / "faults.cpp"
    libraries = ("-L", torch_folder / "lib", "-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu")
    operators = _link(folder / "operators.so", [o for source, o in objects.items() if source != faults], *libraries)
    return operators, _link(
        folder / "faults.so", [objects[emulator / f"{n}.cpp"] for n in ("emulator", "fibers", "faults")]
    )


def _link(library: Path, objects: list[Path], *options: str | Path) -> Path:
    _run(*_compiler(), "-shared", "-fsanitize=address,undefined", *objects, *options, "-o", library)
    return library


class Emulator:
    """Calls functions of this module in a process that began with the address sanitizer.

    The process is started again when a call has ended it.
    """

    def __init__(self, library: Path) -> None:
        self._library = library
        self._process: subprocess.Popen[bytes] | None = None
        self._log = library.with_suffix(".log")

    def __call__(self, function: str, *args: object) -> object:
        process = self._process or self._start()
        try:
            pickle.dump((function, args), process.stdin)
            process.stdin.flush()
            answer = pickle.load(process.stdout)
        except (EOFError, BrokenPipeError):
            process.wait()
            self._process = None
            raise EmulatorError(self._log.read_text(errors="replace")) from None
        if isinstance(answer, Exception):
            raise answer
        return answer

    def close(self) -> None:
        if self._process is not None:
            self._process.stdin.close()
            self._process.wait()

    def _start(self) -> subprocess.Popen[bytes]:
        # Preloaded, the sanitizer finds the C++ runtime only when that is there, too.
        runtimes = [_run(*_compiler(), f"-print-file-name={name}").strip() for name in ("libasan.so", "libstdc++.so.6")]
        assert all(map(os.path.isabs, runtimes)), f"{_compiler()} has no address sanitizer"
        environment = {**os.environ, **_SANITIZERS, "LD_PRELOAD": " ".join(runtimes)}
        environment["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-c", f"import cuda_emulator; cuda_emulator._serve({str(self._library)!r})"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=environment,
            )
        return self._process


def _serve(library: str) -> None:
    answers, sys.stdout = sys.stdout.buffer, sys.stderr
    functions = {"operator": _operator, "raw": _raw, "freed": _freed, "fault": _fault, "plan": _plan}
    functions["last sample"] = _last_sample
    while True:
        try:
            name, args = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        try:
            answer = functions[name](library, *args)
        except RuntimeError as error:
            answer = RuntimeError(str(error))
        pickle.dump(answer, answers)
        answers.flush()


@functools.cache
def _operators(library: str) -> object:
    """The emulated operators, defined like the package's own."""
    import torch

    from fastvit_kernels.ops.library import operators

    torch.set_num_threads(1)
    defined = torch.library.Library(NAMESPACE, "DEF")
    for name, operator in operators.items():
        returns = ", ".join(["Tensor"] * operator.returns)
        defined.define(f"{name}(Tensor?[] tensors, Tensor? packed, {operator.static_schema}) -> ({returns})")
    torch.ops.load_library(library)
    # Definitions live as long as their library.
    torch.ops.fastvit_emulated.definitions = defined
    return torch.ops.fastvit_emulated


def _raw(
    library: str,
    name: str,
    tensors: list,
    static: tuple,
    shared_memory: int = A100,
    processors: int = _PROCESSORS,
    reverse: int = 1,
) -> list:
    """A call on a device whose blocks have so many bytes of shared memory, with so many multiprocessors."""
    ctypes.CDLL(library).fk_emulator_reverse(reverse)
    ctypes.CDLL(library).fk_emulator_shared_memory(shared_memory)
    ctypes.CDLL(library).fk_emulator_processors(processors)
    return list(getattr(_operators(library), name)(tensors, None, *static))


def _freed(library: str, name: str, index: int, tensors: list, static: tuple) -> list:
    """A call whose tensor of this index has lost its memory."""
    tensors[index].untyped_storage().resize_(0)
    return _raw(library, name, tensors, static)


def _last_sample(library: str, name: str, tensors: list, static: tuple, indices: list, batch: int) -> list:
    """The last sample of so many: of the tensors with these indices, which have one here.

    Of the others there is memory that nobody touches, and the blocks that would do not run.
    """
    import torch

    for index in indices:
        (sample,) = tensors[index]
        nbytes = batch * sample.numel() * sample.element_size()
        # Not the sanitizer's, which would fill it.
        memory = torch.frombuffer(mmap.mmap(-1, nbytes), dtype=sample.dtype)
        tensors[index] = memory.view(batch, *sample.shape)
        tensors[index][-1] = sample
    blocks = ctypes.CDLL(library).fk_emulator_blocks
    blocks.argtypes = [ctypes.c_int64]
    blocks(1)
    try:
        return [output[-1:].clone() for output in _raw(library, name, tensors, static)]
    finally:
        blocks(2**62)


def _operator(library: str, name: str, case: str, precision: object, seed: int, changes: dict, orders: tuple) -> list:
    """A case of an operator, with these orders of threads; the results must not differ by a bit."""
    import torch

    from fastvit_kernels.testing.inputs import CASES
    from fastvit_kernels.testing.raw import raw_call

    tensors, static = raw_call(next(c for c in CASES[name] if c.name == case).call(precision, seed))
    static = static._replace(**changes)
    results = []
    for reverse in orders:
        results.append(_raw(library, name, tensors, static, reverse=reverse))
    for first, last in zip(results[0], results[-1], strict=True):
        if not torch.equal(first.view(torch.uint8), last.view(torch.uint8)):
            raise RuntimeError(f"{name}: the order of the threads changes the result")
    return results[0]


def _plan(library: str, name: str, size: int, *arguments: int) -> list[int]:
    """The first `size` numbers that a plan of tests/cuda/emulator/plans.cpp writes."""
    to = (ctypes.c_int64 * size)()
    getattr(ctypes.CDLL(library), f"fk_{name}_plan")(*map(ctypes.c_int64, arguments), to)
    return list(to)


def _fault(library: str, which: int) -> list[list[float]]:
    """What a kernel with a planted mistake leaves behind, for both orders of threads."""
    loaded, found = ctypes.CDLL(library), []
    for reverse in (0, 1):
        loaded.fk_emulator_reverse(reverse)
        out = (ctypes.c_float * 64)()
        loaded.fk_fault(which, out)
        found.append(list(out))
    return found
