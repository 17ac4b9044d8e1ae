"""What a compiled Triton kernel must be, whichever Triton compiled it."""

from __future__ import annotations

from collections.abc import Mapping

from triton_specs import WITH_PRODUCTS

from fastvit_kernels.testing.triton_aot import REGISTERS, SHARED_MEMORY, Compiled

# Of tensor cores.
INSTRUCTIONS = {"sm_80": "mma.sync", "sm_90": "wgmma.mma_async", "gfx942": "v_mfma"}
# Hopper's takes 64 rows, which tiles of unaligned channels do not have: theirs is Ampere's.
OF_ALL_TILES = {**INSTRUCTIONS, "sm_90": "mma"}


def check_fits(kernel: Compiled, architecture: str) -> None:
    assert kernel.spilled == 0, kernel.name
    # Within what the smaller NVIDIA GPUs of the same generations have, too.
    assert kernel.shared <= min(SHARED_MEMORY[architecture], SHARED_MEMORY["sm_89"]), kernel.name
    assert architecture == "gfx942" or kernel.registers * kernel.threads <= REGISTERS, kernel.name


def check_products(kernel: Compiled, architecture: str, instructions: Mapping[str, str] = INSTRUCTIONS) -> None:
    """Those of bf16 and fp16 are the tensor cores'."""
    assert kernel.name not in WITH_PRODUCTS or instructions[architecture] in kernel.assembly, kernel.name
