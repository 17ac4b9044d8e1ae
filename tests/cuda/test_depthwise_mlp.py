"""What only the CUDA kernels of depthwise_mlp do: tiles and slices of results, and which published blocks they take."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from cuda_cases import reasons

from fastvit_kernels.models import create_model, list_models
from fastvit_kernels.ops import library, native
from fastvit_kernels.testing import assert_within_rule
from fastvit_kernels.testing.inputs import BF16, BF16_FP32, FP16, FP32, depthwise_mlp_case
from fastvit_kernels.testing.raw import raw_call

NAME = "depthwise_mlp"
OUT_NORM = {"norm": "group", "out_norm": True, "return_statistics": True}
MEAN = {"prefix": 1, "return_mean": True, "hidden_activation": "gelu", "inner_residual": "after_activation"}


def reference(tensors, static):
    return list(library.operators[NAME].reference(tensors, static))


def check(emulator, precision, **options):
    case = depthwise_mlp_case("case", **options)
    tensors, static = raw_call(case.call(precision))
    assert not reasons(NAME, tensors, static)
    exact = reference(*raw_call(case.call(precision).fp64()))
    assert_within_rule(emulator("raw", NAME, tensors, static), (exact, reference(tensors, static)))


@pytest.mark.parametrize(
    ("precision", "channels"),
    [(BF16, 300), (BF16, 640), (BF16_FP32, 641), (FP16, 600), (FP32, 300), (FP32, 512), (FP32, 640)],
    ids=lambda value: str(value),
)
def test_wide_results(emulator, precision, channels):
    """In the registers of three, four and five panels, and in two slices beyond them."""
    check(emulator, precision, batch=1, grid=(3, 9), channels=24, hidden=24, out=channels, return_statistics=True)


@pytest.mark.parametrize("precision", [BF16, FP32], ids=str)
@pytest.mark.parametrize("kernel", [3, 5])
def test_three_tiles_a_side(emulator, precision, kernel):
    """The middle one has neighbours all around, the last ones are cut off."""
    check(emulator, precision, batch=1, grid=(17, 17), channels=8, hidden=12, kernel=kernel, prefix=3, **OUT_NORM)


@pytest.mark.parametrize("options", [OUT_NORM, MEAN, {"out_norm": True, **MEAN}], ids=["norm", "mean", "both"])
def test_summaries_of_tiles_and_slices(emulator, options):
    check(emulator, BF16, batch=2, grid=(9, 3), channels=8, hidden=24, out=700, **options)


@pytest.mark.parametrize("options", [OUT_NORM, MEAN], ids=["norm", "mean"])
def test_summaries_of_nothing(emulator, options):
    tensors, static = raw_call(depthwise_mlp_case("case", batch=0, **options).call(BF16))
    found = emulator("raw", NAME, tensors, static)
    assert [o.shape for o in found] == [o.shape for o in reference(tensors, static)]


@pytest.mark.parametrize("channels", [512, 640])
def test_wide_rows_leave_less_room(emulator, channels):
    """In fp32 these tiles have less than the 64 results that registers would hold."""
    check(emulator, FP32, batch=1, grid=(7, 8), channels=channels, hidden=8, out=8)


def test_last_stage(emulator):
    check(emulator, BF16, batch=1, grid=(7, 7), channels=512, hidden=72)


def test_long_sums_in_fp32(emulator):
    """One rounding for each of so many products would add up to more than the rule allows."""
    check(emulator, FP32, batch=1, grid=(7, 7), channels=16, hidden=1536, out=64, norm=None)


def test_nan_stays_where_it_is_seen(emulator):
    case = depthwise_mlp_case("case", batch=1, grid=(3, 18), activation="relu", hidden_activation="relu", prefix=1)
    tensors, static = raw_call(case.call(FP32))
    tensors[0][0, 1 + 18 + 7] = float("nan")
    (found, _), (wanted, _) = emulator("raw", NAME, tensors, static), reference(tensors, static)
    assert torch.equal(found.isnan(), wanted.isnan()) and 0 < wanted.isnan().sum() < wanted.numel()


def test_refuses_batch_statistics_and_larger_filters():
    tensors, static = raw_call(depthwise_mlp_case("case", kernel=9).call(FP32))
    assert reasons(NAME, tensors, static._replace(training=True)) == [
        "batch statistics: the CUDA kernels take running ones",
        "a filter of 9: the CUDA kernels take up to 7",
    ]


def published():
    """Every depthwise MLP of the published models with running statistics, by channels, filter's side and the rest."""
    found = {}

    def catch(operator, tensors, static, **options):
        if operator.name == NAME:
            found[tensors[0].shape[2], tensors[10].shape[-1], static._replace(bn_eps=tuple(static.bn_eps))] = tensors
        return operator.fake(tensors, static)

    with mock.patch.object(library, "call", catch), torch.no_grad(), torch.device("meta"):
        for name in list_models():
            if name.startswith("cvt"):
                continue
            # Two blocks of a kind are enough: the last one of a stage may differ.
            depth = {"depth": 2} if name.startswith("dhvt") else {"depths": (2,) * 4}
            model = create_model(name, features_only=True, **depth).eval()
            # CMT's models know the size of their images.
            size = (32, 32) if "cifar" in name else (512, 512) if "segformer" in name else (224, 224)
            model(torch.empty(1, 3, *getattr(model, "img_size", size)))
    return found


@pytest.fixture(scope="module")
def mlps():
    return published()


# Side of the map, channels and side of the filter of those that are refused.
NONE: set[tuple[int, int, int]] = set()
A_FEW = {(7, 640, 3), (8, 608, 3), (14, 320, 5)}


@pytest.mark.parametrize(
    ("dtype", "shared_memory", "refused"),
    [
        (torch.bfloat16, 163 * 1024, NONE),  # A100
        (torch.float32, 163 * 1024, NONE),
        (torch.bfloat16, 99 * 1024, NONE),  # GeForce, L4, A10
        (torch.float32, 99 * 1024, A_FEW),
    ],
)
def test_published_shapes(monkeypatch, mlps, dtype, shared_memory, refused):
    """What a whole row of fp32 channels leaves too little room for is all that is refused."""
    monkeypatch.setattr(native, "shared_memory", lambda device: shared_memory)
    found = {}
    for (channels, kernel, static), tensors in mlps.items():
        tensors = [t if t is None else t.to(dtype) for t in tensors]
        for reason in reasons(NAME, tensors, static._replace(dtype=dtype)):
            found[static.height, channels, kernel] = reason
    assert {channels for channels, *_ in mlps} >= {46, 76, 184, 192, 384, 416, 512, 608, 640}
    assert {static.num_prefix_tokens for *_, static in mlps} == {0, 1}
    assert found.keys() == refused and all("bytes of shared memory" in reason for reason in found.values())


# Side of the map, channels, hidden channels, and how many times the bytes that there are (x, the result and the
# weights, each once) a launch for 64 images moves at most between multiprocessors and the L2 cache: the weights come
# from there for every 64 results. `twice`: two blocks have room on a multiprocessor, and few enough accumulators.
PUBLISHED = {
    "pvt_v2_b2 1": (56, 64, 512, 10, True),
    "pvt_v2_b2 2": (28, 128, 1024, 22, True),
    "pvt_v2_b2 3": (14, 320, 1280, 25, False),
    "pvt_v2_b2 4": (7, 512, 2048, 26, False),
    "cmt_ti 1": (40, 46, 165, 4, True),
    "cmt_s 1": (56, 64, 256, 6, True),
    "cmt_s 2": (28, 128, 512, 12, True),
    "dhvt_s": (14, 384, 1536, 30, False),
}


@pytest.mark.parametrize("shared_memory", [163 * 1024, 227 * 1024], ids=["A100", "H100"])
@pytest.mark.parametrize(("side", "channels", "hidden", "most", "twice"), PUBLISHED.values(), ids=PUBLISHED)
def test_bytes_of_published_shapes(emulator, side, channels, hidden, most, twice, shared_memory):
    blocks, shared, read = emulator("plan", "mlp", 3, side, side, channels, hidden, 3, 0, shared_memory)
    results = 64 * side**2 * channels * 2
    assert 64 * blocks * read + results <= most * (2 * results + 2 * channels * hidden * 2)
    assert (2 * (shared + 1024) <= shared_memory + 1024) or not twice
