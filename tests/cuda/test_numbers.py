"""The CUDA C++ kernels in the emulator: the numerics rule on every case they take, and what they refuse."""

from __future__ import annotations

import re

import pytest
import torch
from cuda_cases import OPERATORS, reasons, taken

from fastvit_kernels.ops import library, native
from fastvit_kernels.testing import assert_within_rule
from fastvit_kernels.testing.inputs import BF16, BF16_FP32, CASES, FP16, FP32, depthwise_mlp_case
from fastvit_kernels.testing.raw import raw_call


def stacked(results):
    return [torch.stack(outputs) for outputs in zip(*results, strict=True)]


def check(emulator, name, case, precision, seeds=(0,), **changes):
    """Hold a case, each output of several draws stacked, to the numerics rule.

    The barriers are the same in every precision: both orders of threads are taken in one of them.
    """
    orders = (0, 1) if precision == BF16 else (1,)
    reference = library.operators[name].reference
    found, exact, low = [], [], []
    for seed in seeds:
        found.append(emulator("operator", name, case.name, precision, seed, changes, orders))
        exact.append(reference(*raw_call(case.call(precision, seed).fp64())))
        tensors, static = raw_call(case.call(precision, seed))
        low.append(reference(tensors, static._replace(**changes)))
    assert_within_rule(stacked(found), (stacked(exact), stacked(low)))


def small(case):
    return "published" not in case.tags


@pytest.mark.parametrize(("name", "case", "precision"), taken([FP32, BF16], small))
def test_forward(emulator, name, case, precision):
    check(emulator, name, case, precision)


@pytest.mark.parametrize(("name", "case", "precision"), taken([FP16, BF16_FP32], lambda case: "smallest" in case.tags))
def test_other_precisions(emulator, name, case, precision):
    check(emulator, name, case, precision)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("name", "case", "precision"), taken([FP32], lambda case: "smallest" in case.tags))
def test_autocast(emulator, name, case, precision, dtype):
    """fp32 tensors, products in another dtype; several draws, since a few statistics hang on how roundings add up."""
    check(emulator, name, case, precision, range(4), dtype=dtype)


def test_a_published_size(emulator):
    (case,) = [case for case in CASES["local_attention"] if not small(case)]
    check(emulator, "local_attention", case, BF16)


def test_three_panels_of_results(emulator):
    """What the larger of the kernels is for; other operators have cases for theirs."""
    case = depthwise_mlp_case("wide", batch=1, grid=(3, 9), channels=40, out=300)
    tensors, static = raw_call(case.call(BF16))
    reference = library.operators["depthwise_mlp"].reference
    found = emulator("raw", "depthwise_mlp", tensors, static)
    assert_within_rule(found, (list(reference(*raw_call(case.call(BF16).fp64()))), list(reference(tensors, static))))


def test_what_is_refused():
    """A reason too many would empty the tests above."""
    refused = {
        name: {case.name for case in CASES[name] if small(case) and reasons(name, *raw_call(case.call(FP32)))}
        for name in OPERATORS
    }
    assert refused == {
        "conv_projection": {"bn_training", "bn_training_untracked", "bn_training_many_rows"},
        "depthwise_mlp": {
            *("daff", "shared_channels", "prefix", "prefix_without_residual"),
            *("hat", "hat_given_statistics", "shared_between_norms", "mean_behind_norm", "other_out_width"),
        },
        "local_attention": {"window_16", "statistics_of_a_window_cut_off"},
    }


def smallest(name, **changes):
    """Tensors and static arguments to be changed."""
    tensors, static = raw_call(next(case for case in CASES[name] if "smallest" in case.tags).call(FP32))
    return tensors, static._replace(**changes)


def too_large_for_attention(dtype, window):
    """1200 channels in, 3 heads of 40, 250 out."""
    _, static = smallest("local_attention", dtype=dtype, norm="none", window_size=window, num_heads=3, pad="none")
    shapes = {0: (1, window**2, 1200), 6: (360, 1200), 9: (250, 120)}
    tensors = [torch.zeros(shapes[i], dtype=dtype) if i in shapes else None for i in range(12)]
    return tensors, static._replace(height=window, width=window, return_statistics=False)


def too_large_for_the_mlp(dtype, kernel):
    """530 channels."""
    _, static = smallest("depthwise_mlp", dtype=dtype, norm="none", height=3, width=3)
    shapes = {0: (1, 9, 530), 4: (40, 530), 10: (40, 1, kernel, kernel), 16: (16, 40)}
    return [torch.zeros(shapes[i], dtype=dtype) if i in shapes else None for i in range(25)], static


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("local_attention", too_large_for_attention(torch.float32, 7)),
        ("local_attention", too_large_for_attention(torch.bfloat16, 8)),
        ("depthwise_mlp", too_large_for_the_mlp(torch.float32, 3)),
        ("depthwise_mlp", too_large_for_the_mlp(torch.bfloat16, 7)),
    ],
)
def test_shared_memory_is_what_the_kernels_ask_for(emulator, name, call):
    """A call that takes too much is refused before it is launched, by the same count on both sides."""
    (reason,) = reasons(name, *call)
    needed = re.search(r"takes (\d+) bytes of shared memory", reason)[1]
    assert int(needed) > native.MOST_SHARED_MEMORY
    with pytest.raises(RuntimeError, match=f"needs {needed} bytes of shared memory"):
        emulator("raw", name, *call)


def test_refuses_wide_heads_and_windows():
    tensors = [torch.zeros(1, 4, 3 * 136), *[None] * 11]
    _, static = smallest("local_attention", norm="none", height=2, width=2, window_size=2, num_heads=1)
    assert reasons("local_attention", tensors, static) == ["heads of 136 channels: the CUDA kernels take up to 128"]
    tensors[0] = tensors[0][..., :48].contiguous()
    (reason,) = reasons("local_attention", tensors, static._replace(window_size=65))
    assert reason == "windows 65 pixels wide: the CUDA kernels take up to 64"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"stride": [1, 17, 2]}, "stride 17: the CUDA kernels take at most 16"),
        ({"padding": [1, 1, 65]}, "padding 65: the CUDA kernels take at most 64"),
    ],
)
def test_refuses_projections_out_of_bounds(change, reason):
    assert reasons("conv_projection", *smallest("conv_projection", **change)) == [reason]


@pytest.mark.parametrize("name", ["depthwise_mlp", "local_attention"])
def test_refuses_a_residual_of_a_third_dtype(name):
    tensors, static = smallest(name, dtype=torch.float16)
    tensors[-1] = tensors[-1].bfloat16()
    assert "residual of bfloat16 beside float16" in reasons(name, tensors, static)[0]
