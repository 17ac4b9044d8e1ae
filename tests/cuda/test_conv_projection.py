"""What only the CUDA kernels of conv_projection do: how they divide the work, and that every division is right."""

from __future__ import annotations

import pytest

from fastvit_kernels.ops import library
from fastvit_kernels.testing import assert_within_rule
from fastvit_kernels.testing.inputs import BF16, FP32, conv_projection_case
from fastvit_kernels.testing.raw import raw_call

NAME = "conv_projection"


def check(emulator, precision, shared_memory, processors, **options):
    case = conv_projection_case("case", **options)
    tensors, static = raw_call(case.call(precision))
    reference = library.operators[NAME].reference
    found = emulator("raw", NAME, tensors, static, shared_memory, processors)
    assert_within_rule(
        found, (list(reference(*raw_call(case.call(precision).fp64()))), list(reference(tensors, static)))
    )


@pytest.mark.parametrize("precision", [BF16, FP32], ids=str)
@pytest.mark.parametrize("shared_memory", [227 * 1024, 64 * 1024], ids=["large", "small"])
@pytest.mark.parametrize(
    "options",
    [
        {"grid": (17, 31), "channels": 24, "prefix": 1},
        {"grid": (13, 15), "channels": 72, "out": (72, 130, 40)},
        {"grid": (30, 9), "channels": 16, "kernel": (3, 5, 1), "padding": (1, 2, 0)},
        {"grid": (16, 16), "channels": 8, "padding": (1, 9, 4), "stride": (1, 3, 2)},
    ],
    ids=["prefix", "chunks", "kernels", "padding"],
)
def test_few_large_blocks(emulator, precision, shared_memory, options):
    """One multiprocessor: blocks are as large as shared memory and registers allow, and several branches share them."""
    check(emulator, precision, shared_memory, 1, batch=1, **options)


def test_many_prefix_tokens(emulator):
    """More than a block takes at a time."""
    check(emulator, BF16, 227 * 1024, 1, batch=3, grid=(2, 2), channels=8, prefix=31)


def plan(emulator, gpu, batch, side, channels, prefix):
    shared_memory, processors = gpu
    sets, shared, *rest = emulator("plan", "projection", 14, batch, side, side, channels, prefix, 0, *gpu)
    return shared, [tuple(rest[4 * i : 4 * i + 4]) for i in range(sets)]


A100, H100 = (163 * 1024, 108), (227 * 1024, 132)
# Side of the map, channels and prefix tokens of CvT-13's stages, and how many times the bytes that there are (x, q, k,
# v and the weights, each once) a launch for 64 images moves at most between multiprocessors and the L2 cache.
CVT_13 = [(56, 64, 0, 2.25), (28, 192, 0, 6), (14, 384, 1, 8)]


@pytest.mark.parametrize("gpu", [A100, H100], ids=["A100", "H100"])
@pytest.mark.parametrize(("side", "channels", "prefix", "most"), CVT_13)
def test_bytes_and_rows_of_published_shapes(emulator, gpu, side, channels, prefix, most):
    batch, pixels, keys = 64, side**2, (side // 2) ** 2
    shared, sets = plan(emulator, gpu, batch, side, channels, prefix)
    given = batch * (2 * (pixels + prefix) + 2 * (keys + prefix)) * channels * 2
    floor = given + 3 * channels**2 * 2
    read = sum(blocks * bytes_of_block for _, blocks, bytes_of_block, _ in sets)
    results = batch * (pixels + 2 * keys + 3 * prefix) * channels * 2
    assert batch * read + results <= most * floor
    # Rows that are multiplied for nothing.
    assert sum(blocks * rows for _, blocks, _, rows in sets) <= 1.75 * (pixels + 2 * keys)
    # Two blocks have room on a multiprocessor; at the last stage an A100's would then read the weights for fewer rows.
    assert 2 * (shared + 1024) <= gpu[0] + 1024 or (gpu, side) == (A100, 14)
    assert batch * sum(blocks for _, blocks, *_ in sets) >= 2 * gpu[1]


@pytest.mark.parametrize("gpu", [A100, H100], ids=["A100", "H100"])
def test_x_is_read_once_where_weights_are_small(emulator, gpu):
    """By all three branches together, and once more at the borders of patches."""
    _, sets = plan(emulator, gpu, 64, 56, 64, 0)
    ((branches, blocks, read, _),) = sets
    weights = 3 * 64 * 64 * 2
    assert branches == 3 and blocks * (read - weights) <= 1.6 * 56**2 * 64 * 2


def test_large_weights_are_read_for_many_rows(emulator):
    """At CvT's last stage a block of all branches would read 885 KB of weights for 49 queries."""
    _, sets = plan(emulator, H100, 64, 14, 384, 1)
    assert len(sets) > 1


def test_one_image_is_divided_among_all(emulator):
    for side, channels, prefix, _ in CVT_13:
        _, sets = plan(emulator, H100, 1, side, channels, prefix)
        assert 48 <= sum(blocks for _, blocks, *_ in sets) <= 2 * H100[1]
