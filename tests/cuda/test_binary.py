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
    "moments_kernel": 256,
    "merge_moments_kernel": 256,
}
TOOL = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
PART = _extension.parts["cuda"]
# Without nvcc there is no library to read; that this is why, `test_left_out_only_without_a_compiler` asserts.
KERNELS = [(name, arch) for name in THREADS for arch in ARCHITECTURES] if PART.loaded else []


def read(*options):
    return subprocess.run([TOOL, *options, PART.path], check=True, capture_output=True, text=True).stdout


@pytest.fixture(scope="module")
def usage():
    """Registers and bytes of stack of every kernel, by architecture and mangled name."""
    found = {}
    for section in read("--dump-resource-usage").split("Fatbin elf code:")[1:]:
        arch = re.search(r"arch = (\S+)", section)[1]
        for name, registers, stack in re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+)", section):
            found[arch, name] = int(registers), int(stack)
    return found


def test_left_out_only_without_a_compiler():
    assert PART.loaded or re.search("no working nvcc|FASTVIT_CUDA=0|never installed", PART.problem)


@pytest.mark.parametrize(("name", "arch"), KERNELS)
def test_registers_without_spills(usage, name, arch):
    kernels = {key: value for key, value in usage.items() if key[0] == arch and re.search(rf"\d{name}(I|E)", key[1])}
    assert kernels, f"no {name} for {arch}"
    for (_, mangled), (registers, stack) in kernels.items():
        assert stack == 0, f"{mangled} spills"
        assert registers * THREADS[name] <= REGISTERS, f"{mangled} has {registers} registers"


def test_every_kernel_is_listed(usage):
    """A kernel that the tests above do not know would go unread."""
    known = re.compile(rf"\d({'|'.join(THREADS)})(I|E)")
    assert [mangled for _, mangled in usage if not known.search(mangled)] == []


@pytest.mark.parametrize("arch", ARCHITECTURES if PART.loaded else [])
@pytest.mark.parametrize(
    ("kernel", "instructions"),
    [
        (
            "local_attention_kernelI13__nv_bfloat16",
            ("HMMA.16816.F32.BF16", "LDSM.16.M88.4", "LDSM.16.MT88.4", "LDGSTS"),
        ),
        ("depthwise_mlp_kernelI6__half", ("HMMA.16816.F32 ", "LDSM.16.M88", "LDGSTS")),
        ("conv_projection_kernelI6__half", ("HMMA.16816.F32 ", "LDSM.16.M88", "LDGSTS")),
    ],
)
def test_matrix_instructions(usage, arch, kernel, instructions):
    """Tensor cores, matrices from shared memory, and copies into it."""
    name = next(mangled for key, mangled in usage if key == arch and kernel in mangled)
    assembly = read("--dump-sass", "--gpu-architecture", arch, "--function", name)
    for instruction in instructions:
        assert instruction in assembly, f"no {instruction} in {name} for {arch}"


def test_later_gpus_can_compile_it():
    assert not PART.loaded or "arch = sm_90\n" in read("--dump-ptx").split("Fatbin ptx code:", 1)[1]
