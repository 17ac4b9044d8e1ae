"""The Triton kernels that published models launch, in inference and training, compiled for GPUs that need not be there.

Here those whose registers or shared memory are the scarcest. `TEST_TRITON_MODELS=cmt_b` takes every kernel of that
model, `TEST_TRITON_MODELS=1` of every one: twenty minutes in one process where Triton has nothing cached.
"""

from __future__ import annotations

import os
from collections.abc import Collection
from concurrent.futures import Executor

import pytest
from published_calls import MODELS, launches_of
from triton_calls import PRECISIONS
from triton_fits import OF_ALL_TILES, check_fits, check_products

from fastvit_kernels.testing.triton_aot import Compiled, Launch, compile_launches, compiling_process

# Model, precision, architecture and kernels.
SCARCE = [
    ("cmt_b", "float32", "sm_90", ("attention_saved_kernel", "bias_gradient_kernel", "attention_kernel")),
    ("cmt_b", "float32", "sm_80", ("bias_gradient_kernel",)),
    ("cmt_xs", "float32", "sm_90", ("attention_saved_kernel",)),
    ("cmt_b", "bfloat16", "sm_80", ("attention_kernel", "filter_gradient_kernel")),
    ("cmt_b", "autocast-bfloat16", "sm_80", ("input_gradient_kernel", "filter_gradient_kernel")),
    ("cmt_ti", "autocast-bfloat16", "sm_80", ("input_gradient_kernel",)),
    ("cmt_ti", "float32", "sm_80", ("embed_kernel",)),
    ("cmt_ti", "autocast-bfloat16", "sm_90", ("layer_norm_gradient_kernel",)),
    ("cmt_s", "autocast-bfloat16", "sm_90", ("linear_kernel",)),
    ("cmt_s", "bfloat16", "sm_80", ("depthwise_kernel",)),
    ("hat_net_tiny", "autocast-bfloat16", "sm_90", ("input_gradient_kernel",)),
    ("pvt_v2_b0", "autocast-bfloat16", "sm_80", ("project_kernel", "pixel_gradient_kernel")),
    ("pvt_v2_b0", "float32", "sm_90", ("pixel_gradient_kernel",)),
    ("mit_b0", "bfloat16", "sm_80", ("project_kernel", "attention_projection_kernel")),
    ("dhvt_tiny_imagenet_patch16", "autocast-bfloat16", "sm_90", ("linear_kernel",)),
    ("dhvt_small_imagenet_patch16", "bfloat16", "sm_90", ("step_gradient_kernel",)),
    ("dhvt_small_imagenet_patch16", "bfloat16", "sm_80", ("query_gradient_kernel", "key_gradient_kernel")),
]
ALL = [
    (model, precision, architecture, ())
    for model in MODELS
    for precision in ("float32", "bfloat16", "autocast-bfloat16")
    for architecture in ("sm_80", "sm_90")
]
CHOSEN = os.environ.get("TEST_TRITON_MODELS")
CASES = SCARCE if CHOSEN is None else [case for case in ALL if CHOSEN in ("1", case[0])]


def compile_model(model: str, precision: str, architecture: str, kernels: Collection[str]) -> list[Compiled]:
    """Each kernel once, of those named or of all."""
    seen: set[Launch] = set()

    def wanted(launch: Launch) -> bool:
        if launch in seen or (kernels and launch.name not in kernels):
            return False
        seen.add(launch)
        return True

    launches = launches_of(model, PRECISIONS[precision])
    return [kernel for launch in launches for kernel in compile_launches(launch, architecture, wanted)]


@pytest.fixture(scope="module")
def process():
    with compiling_process() as pool:
        yield pool


@pytest.mark.parametrize(
    ("model", "precision", "architecture", "kernels"), [pytest.param(*case, id="-".join(case[:3])) for case in CASES]
)
def test_published_models_fit_the_gpu(
    process: Executor, model: str, precision: str, architecture: str, kernels: tuple[str, ...]
) -> None:
    found = process.submit(compile_model, model, precision, architecture, kernels).result()
    assert found and {kernel.name for kernel in found} >= set(kernels)
    for kernel in found:
        check_fits(kernel, architecture)
        if precision != "float32":
            check_products(kernel, architecture, OF_ALL_TILES)
