"""The CUDA C++ kernels in the emulator: the numerics rule on every case they take, and what they refuse."""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest
import torch
from cuda_cases import OPERATORS, reasons, taken
from cuda_emulator import A100, EmulatorError

from fastvit_kernels.ops import library, native
from fastvit_kernels.testing import assert_within_rule
from fastvit_kernels.testing.inputs import (
    BF16,
    BF16_FP32,
    CASES,
    FP16,
    FP32,
    conv_projection_case,
    depthwise_mlp_case,
    local_attention_case,
)
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


@pytest.mark.parametrize("channels", [7, 16])
def test_statistics_from_several_parts(emulator, channels):
    """A sample of more values than one block sums up; 16 bytes at a time or one by one."""
    options = {"grid": (40, 24), "window": 8, "heads": 1, "width": 4, "channels": channels, "norm": "group"}
    case = local_attention_case("case", batch=2, **options)
    tensors, static = raw_call(case.call(BF16))
    reference = library.operators["local_attention"].reference
    exact, low = list(reference(*raw_call(case.call(BF16).fp64()))), list(reference(tensors, static))
    assert_within_rule(emulator("raw", "local_attention", tensors, static), (exact, low))


THIRD = {"conv_projection": "plain", "depthwise_mlp": "prefix_without_residual", "local_attention": "projection_only"}


@pytest.mark.parametrize(("precision", "dtype"), [(FP16, torch.bfloat16), (BF16, torch.float16)], ids=str)
@pytest.mark.parametrize("name", OPERATORS)
def test_autocast_of_the_other_16_bits(emulator, name, precision, dtype):
    case = next(case for case in CASES[name] if case.name == THIRD[name])
    check(emulator, name, case, precision, range(4), dtype=dtype)


@pytest.mark.parametrize(("name", "case", "precision"), taken([BF16], lambda case: "smallest" in case.tags))
def test_rows_may_begin_anywhere(emulator, name, case, precision):
    """Tensors at odd places, whose rows cannot be copied 16 bytes at a time."""
    tensors, static = raw_call(case.call(precision))
    moved = [t if t is None else torch.empty(t.numel() + 1, dtype=t.dtype)[1:].view_as(t).copy_(t) for t in tensors]
    aligned, found = emulator("raw", name, tensors, static), emulator("raw", name, moved, static)
    assert all(torch.equal(a, f) for a, f in zip(aligned, found, strict=True))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(("name", "case", "precision"), taken([FP32], lambda case: "smallest" in case.tags))
def test_what_is_not_finite_shows_where_it_should(emulator, name, case, precision, value):
    tensors, static = raw_call(case.call(precision))
    tensors[0] = tensors[0].clone()
    tensors[0].view(-1)[tensors[0].numel() // 2] = value
    wanted = [output.isfinite() for output in library.operators[name].reference(tensors, static)]
    found = [output.isfinite() for output in emulator("raw", name, tensors, static)]
    assert all(torch.equal(f, w) for f, w in zip(found, wanted, strict=True))
    assert not wanted[0].all()


@pytest.mark.parametrize("fill", [float("-inf"), torch.finfo(torch.float32).min])
@pytest.mark.parametrize(("window", "masked"), [(4, 5), (11, 64)])
def test_biases_that_mask_keys(emulator, window, masked, fill):
    """Row 0 at the first keys, which may be a tile of them, row 1 but for the last key, row 2 wholly."""
    area, generator = window**2, torch.Generator().manual_seed(0)
    bias = torch.zeros(1, area, area)
    bias[:, 0, :masked], bias[:, 1, :-1], bias[:, 2] = fill, fill, fill
    tensors = [torch.randn(1, area, 48, generator=generator), *[None] * 7, bias, *[None] * 3]
    changes = {"height": window, "width": window, "window_size": window, "num_heads": 1, "pad": "none"}
    static = smallest("local_attention", norm="none", scale=0.25, return_statistics=False, **changes)[1]
    assert not reasons("local_attention", tensors, static)
    (found, _), (wanted, _) = (
        emulator("raw", "local_attention", tensors, static),
        library.operators["local_attention"].reference(tensors, static),
    )
    assert torch.equal(found.isnan(), wanted.isnan()) and not wanted[:, :2].isnan().any()
    torch.testing.assert_close(found.nan_to_num(), wanted.nan_to_num(), rtol=1e-5, atol=1e-5)


LARGE = {
    "conv_projection": (conv_projection_case, {"grid": (4, 4), "channels": 8, "kernel": (1, 3, 3)}),
    "depthwise_mlp": (
        depthwise_mlp_case,
        {"grid": (4, 4), "channels": 8, "hidden": 8, "prefix": 1, "norm": "group", "out_norm": True},
    ),
    "local_attention": (local_attention_case, {"grid": (4, 4), "window": 4, "channels": 16, "norm": "group"}),
}


@pytest.mark.parametrize("name", OPERATORS)
def test_offsets_that_32_bits_do_not_hold(emulator, name):
    """The last sample of tensors with more than 2^31 values."""
    make, options = LARGE[name]
    statistics = {} if name == "conv_projection" else {"return_statistics": True}
    case, other = (make("case", batch=batch, **options, **statistics) for batch in (1, 2))
    tensors, static = raw_call(case.call(BF16))
    both = zip(tensors, raw_call(other.call(BF16))[0], strict=True)
    per_sample = [index for index, (t, o) in enumerate(both) if t is not None and t.shape != o.shape]
    batch = 2**31 // tensors[0].numel() + 2
    found = emulator("last sample", name, tensors, static, per_sample, batch)
    reference = library.operators[name].reference
    assert_within_rule(found, (list(reference(*raw_call(case.call(BF16).fp64()))), list(reference(tensors, static))))


def test_what_is_refused():
    """A reason too many would empty the tests above."""
    refused = {
        name: {case.name for case in CASES[name] if small(case) and reasons(name, *raw_call(case.call(FP32)))}
        for name in OPERATORS
    }
    assert refused == {
        "conv_projection": {"bn_training", "bn_training_untracked", "bn_training_many_rows"},
        "depthwise_mlp": set(),
        "local_attention": {"window_16", "statistics_of_a_window_cut_off"},
    }


def smallest(name, **changes):
    """Tensors and static arguments to be changed."""
    tensors, static = raw_call(next(case for case in CASES[name] if "smallest" in case.tags).call(FP32))
    return tensors, static._replace(**changes)


SHARED_MEMORY = [
    *(("conv_projection", name) for name in ("plain", "three_kernels", "many_channels")),
    *(("depthwise_mlp", name) for name in ("mix_ffn", "wider_filter", "odd_hidden", "one_pixel")),
    *(("local_attention", name) for name in ("plain", "packed", "window_11", "width_46_mask", "other_out_width")),
]


@pytest.mark.parametrize("precision", [BF16, FP32], ids=str)
@pytest.mark.parametrize(("name", "case"), SHARED_MEMORY)
def test_shared_memory(emulator, monkeypatch, name, case, precision):
    """Both sides count alike: a call runs where there is just enough, and is refused before a launch where a byte is
    missing."""
    tensors, static = raw_call(next(c for c in CASES[name] if c.name == case).call(precision))
    monkeypatch.setattr(native, "shared_memory", lambda device: 0)
    (reason,) = reasons(name, tensors, static)
    needed = int(re.fullmatch(r"a block takes (\d+) bytes of shared memory, 0 are there", reason)[1])
    (found, *_), (wanted, *_) = (emulator("raw", name, tensors, static, *most) for most in ([needed], []))
    torch.testing.assert_close(found, wanted)
    with pytest.raises(RuntimeError, match=f"needs {needed} bytes of shared memory"):
        emulator("raw", name, tensors, static, needed - 1)


def test_a_device_that_does_not_answer_is_no_small_one(emulator):
    for name in OPERATORS:
        with pytest.raises(RuntimeError, match="asked for the shared memory of a block: the emulated device does not"):
            emulator("raw", name, *smallest(name), -1)
    with pytest.raises(RuntimeError, match="CUDA, asked for the multiprocessors: the emulated device does not work"):
        emulator("raw", "conv_projection", *smallest("conv_projection"), A100, -1)


@pytest.mark.parametrize("name", OPERATORS)
def test_refuses_freed_memory(emulator, name):
    with pytest.raises(RuntimeError, match="x: its memory has been freed"):
        emulator("freed", name, 0, *smallest(name))


def test_refuses_rows_beyond_its_arithmetic(emulator):
    """The size of a tile of such rows would not fit 32 bits, and could come out as a small one."""
    tensors, static = smallest("depthwise_mlp", norm="none", height=1, width=1)
    shapes = {0: (1, 1, 2**20), 4: (1, 2**20), 10: (1, 1, 1, 1), 16: (1, 1)}
    tensors = [torch.zeros(shapes[i]) if i in shapes else None for i in range(25)]
    with pytest.raises(RuntimeError, match="x: expected less than 2\\^20 channels"):
        emulator("raw", "depthwise_mlp", tensors, static)


def test_each_gpu_has_its_own_shared_memory(monkeypatch):
    of_h100 = SimpleNamespace(shared_memory_per_block_optin=227 * 1024)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: of_h100)
    assert native.shared_memory.__wrapped__(torch.device("cuda", 1)) == 227 * 1024


@pytest.mark.parametrize("name", OPERATORS)
def test_integers_that_overflow(emulator, name):
    tensors, static = smallest(name)
    fields = {field: value for field, value in static._asdict().items() if isinstance(value, (int, list))}
    fields = {f: v for f, v in fields.items() if not isinstance(v[0] if isinstance(v, list) else v, (bool, float))}
    assert {"height", "width"} < fields.keys()
    for field, value in fields.items():
        for huge in (2**31, 2**61, 2**63 - 1, -1, -(2**63)):
            changed = static._replace(**{field: [huge, *value[1:]] if isinstance(value, list) else huge})
            with pytest.raises(RuntimeError) as raised:
                emulator("raw", name, tensors, changed)
            assert not isinstance(raised.value, EmulatorError), field


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
