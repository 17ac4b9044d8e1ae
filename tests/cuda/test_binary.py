"""What the compiler made of the CUDA kernels, read from the library: no GPU is needed."""

from __future__ import annotations

import re
import subprocess
from itertools import product
from pathlib import Path

import pytest
import triton

from fastvit_kernels import _extension

ARCHITECTURES = ("sm_80", "sm_90a")
REGISTERS = 64 * 1024
# Threads of a block, by kernel.
THREADS = {
    "conv_projection_kernel": 256,
    "local_attention_kernel": 128,
    "depthwise_mlp_kernel": 256,
    "result_norm_kernel": 256,
    "merge_sums_kernel": 256,
    "moments_kernel": 256,
    "merge_moments_kernel": 256,
}
TOOL = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
PART = _extension.parts["cuda"]


def read(*options):
    return subprocess.run([TOOL, *options, PART.path], check=True, capture_output=True, text=True).stdout


@pytest.fixture(scope="module")
def usage():
    """Registers and bytes of stack of every kernel, by architecture and mangled name.

    Empty where there was no compiler, which must then be the reason: the tests have nothing to read.
    """
    if not PART.loaded:
        assert re.search("no working nvcc|FASTVIT_CUDA=0|never installed", PART.problem)
        return {}
    found = {}
    for section in read("--dump-resource-usage").split("Fatbin elf code:")[1:]:
        arch = re.search(r"arch = (\S+)", section)[1]
        for name, registers, stack in re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+)", section):
            found[arch, name] = int(registers), int(stack)
    return found


def kernel_of(mangled):
    (name,) = [name for name in THREADS if re.search(rf"\d{name}[IE]", mangled)]
    return name


def test_every_kernel_is_there_for_every_architecture(usage):
    found = {(arch, kernel_of(mangled)) for arch, mangled in usage}
    assert found == ({(arch, name) for arch in ARCHITECTURES for name in THREADS} if PART.loaded else set())


def test_registers_without_spills(usage):
    for (arch, mangled), (registers, stack) in usage.items():
        assert stack == 0, f"{mangled} spills on {arch}"
        assert registers * THREADS[kernel_of(mangled)] <= REGISTERS, f"{mangled} has {registers} registers on {arch}"


# Blocks whose registers a multiprocessor has, of kernels for 16-bit values, by what follows the dtype in their names:
# the panels of results of an MLP, the values of a head in eights.
TOGETHER = {
    ("conv_projection_kernel", ""): 2,
    ("depthwise_mlp_kernel", "Li1"): 2,
    ("depthwise_mlp_kernel", "Li2"): 2,
    ("local_attention_kernel", "Li8"): 3,
    ("local_attention_kernel", "Li16"): 2,
}


def test_registers_of_several_blocks(usage):
    seen = set()
    for (arch, mangled), (registers, _) in usage.items():
        kernel = kernel_of(mangled)
        if found := re.search(rf"{kernel}I(?:6__half|13__nv_bfloat16)(\w*?)E", mangled):
            blocks = TOGETHER.get((kernel, found[1]), 1)
            # Registers are dealt out to warps in eights for each thread.
            assert -(-registers // 8) * 8 * THREADS[kernel] * blocks <= REGISTERS, f"{mangled} on {arch}"
            seen.add((kernel, found[1]))
    assert TOGETHER.keys() <= seen or not PART.loaded


@pytest.fixture(scope="module")
def instructions():
    """Those of matrices, of copies into shared memory, of 16 bytes of global memory, and of single bytes of shared
    memory, of every kernel, by architecture and mangled name."""
    found = {}
    arch, names = "", set()
    for line in read("--dump-sass").splitlines() if PART.loaded else []:
        if "arch = " in line:
            arch = line.partition("arch = ")[2].strip()
        elif "Function : " in line:
            names = found.setdefault((arch, line.partition("Function : ")[2].strip()), set())
        elif instruction := re.search(r"\b((H\w*MMA|LDSM|LDGSTS)[.\w]*|(LDG|STG)\.E\.128|(LDS|STS)\.[US]8)", line):
            names.add(instruction[0])
    return found


def expected(kernel, dtype):
    """Products of fp32 stay in fp32; the others accumulate in it, and only attention has a transposed matrix.

    Activations and weights are read, and results written, 16 bytes at a time, and nothing goes through shared memory by
    the byte, which is what the compiler makes of a copy whose alignment it does not know.
    """
    wide = {"LDG.E.128", "STG.E.128"}
    if kernel not in ("conv_projection_kernel", "depthwise_mlp_kernel", "local_attention_kernel"):
        return {"result_norm_kernel": wide, "moments_kernel": {"LDG.E.128"}}.get(kernel, set())
    wide.add("LDGSTS.128")
    if dtype == "f":
        return wide
    transposed = {"LDSM.16.MT88"} if kernel == "local_attention_kernel" else set()
    return {
        "HMMA.16816.F32.BF16" if dtype == "13__nv_bfloat16" else "HMMA.16816.F32",
        "LDSM.16.M88",
        *wide,
    } | transposed


def test_matrix_instructions(usage, instructions):
    """Tensor cores, matrices from shared memory, and copies into it, in each instantiation."""
    assert instructions.keys() == usage.keys()
    kinds = set()
    for (arch, mangled), names in instructions.items():
        kernel = kernel_of(mangled)
        dtype = re.search(rf"{kernel}(?:I(f|6__half|13__nv_bfloat16))?", mangled)[1]
        kinds.add((arch, kernel, dtype))
        # Without hints for caches and the number of matrices.
        found = {re.sub(r"^(LDGSTS|LDSM\.16\.MT?88)\b.*?(\.128)?$", r"\1\2", name) for name in names}
        assert found == expected(kernel, dtype), f"{mangled} for {arch}"
    dtypes = ("f", "6__half", "13__nv_bfloat16")
    typed = [kernel for kernel in THREADS if kernel != "merge_moments_kernel"]
    wanted = {
        (arch, *kind) for arch in ARCHITECTURES for kind in [("merge_moments_kernel", None), *product(typed, dtypes)]
    }
    assert kinds == (wanted if PART.loaded else set())


def test_later_gpus_can_compile_it():
    assert not PART.loaded or "arch = sm_90\n" in read("--dump-ptx").split("Fatbin ptx code:", 1)[1]
