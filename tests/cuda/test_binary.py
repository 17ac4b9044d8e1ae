"""What the compiler made of the CUDA kernels, read from the library: no GPU is needed."""

from __future__ import annotations

import re
import subprocess
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


@pytest.mark.parametrize(
    ("kernel", "instructions"),
    [
        ("local_attention_kernelI13__nv_bfloat16", ("HMMA.16816.F32.BF16", "LDSM.16.M88", "LDSM.16.MT88", "LDGSTS")),
        ("depthwise_mlp_kernelI6__half", ("HMMA.16816.F32 ", "LDSM.16.M88", "LDGSTS")),
        ("conv_projection_kernelI6__half", ("HMMA.16816.F32 ", "LDSM.16.M88", "LDGSTS")),
    ],
)
def test_matrix_instructions(usage, kernel, instructions):
    """Tensor cores, matrices from shared memory, and copies into it."""
    for arch, mangled in {arch: mangled for arch, mangled in usage if kernel in mangled}.items():
        assembly = read("--dump-sass", "--gpu-architecture", arch, "--function", mangled)
        for instruction in instructions:
            assert instruction in assembly, f"no {instruction} in {mangled} for {arch}"


def test_later_gpus_can_compile_it():
    assert not PART.loaded or "arch = sm_90\n" in read("--dump-ptx").split("Fatbin ptx code:", 1)[1]
