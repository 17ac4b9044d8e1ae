"""What a compiled Triton kernel must be, whichever Triton compiled it."""

from __future__ import annotations

from fastvit_kernels.testing.triton_aot import REGISTERS, SHARED_MEMORY, Compiled

WITHOUT_PRODUCTS = (
    *("prepare_kernel", "pack_kernel", "normalize_kernel", "moments_kernel", "merge_kernel", "sum_parts_kernel"),
    *("pool_kernel", "layer_norm_gradient_kernel", "group_norm_gradient_kernel", "group_norm_sums_kernel"),
    *("statistics_gradient_kernel", "step_gradient_kernel", "step_sums_kernel"),
    *("row_moments_kernel", "merge_parts_kernel", "spread_kernel", "rows_kernel", "step_kernel"),
    *("merge_tokens_kernel", "merge_tokens_gradient_kernel"),
    *("pieces_kernel", "pieces_gradient_kernel"),
    *("depthwise_kernel", "depthwise_input_gradient_kernel", "depthwise_filter_gradient_kernel"),
)
# Of tensor cores.
INSTRUCTIONS = {"sm_80": "mma.sync", "sm_90": "wgmma.mma_async", "gfx942": "v_mfma"}


def check_fits(kernel: Compiled, architecture: str) -> None:
    assert kernel.spilled == 0, kernel.name
    # Within what the smaller NVIDIA GPUs of the same generations have, too.
    assert kernel.shared <= min(SHARED_MEMORY[architecture], SHARED_MEMORY["sm_89"]), kernel.name
    assert architecture == "gfx942" or kernel.registers * kernel.threads <= REGISTERS, kernel.name


def check_products(kernel: Compiled, architecture: str) -> None:
    """Those of bf16 and fp16 are the tensor cores'."""
    assert kernel.name in WITHOUT_PRODUCTS or INSTRUCTIONS[architecture] in kernel.assembly, kernel.name
