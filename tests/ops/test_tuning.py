"""Measured configurations: what a file holds, what is looked up, and that it changes launches and no numbers."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from fastvit_kernels import cli, ops, use_backend
from fastvit_kernels.ops import triton_support, tuning
from fastvit_kernels.ops.triton_configs import CONFIGS, Config
from fastvit_kernels.ops.triton_support import Arithmetic
from fastvit_kernels.ops.tuning import Launch, Preference, Tuning
from fastvit_kernels.testing import assert_within_rule, inputs

CONFIG = Config(32, 128, 64, 8, 4)
LAUNCH = Launch("linear", "sm_90", "half", 192, 768, CONFIG, "NVIDIA H200", 0.051, 0.0625)
OLDER = replace(LAUNCH, config=CONFIG._replace(num_warps=4))
TIMES = {"triton": 1.5, "cuda": 1, "reference": 12.25}
PREFERENCE = Preference("depthwise_mlp", "NVIDIA H200", "9.0", "bfloat16", "forward", 64, TIMES, "nvidia-h200.csv")
HALF = Arithmetic("sm_90", "half", torch.bfloat16)


def test_round_trip(tmp_path):
    written = Tuning((LAUNCH, replace(LAUNCH, width=64)), (PREFERENCE,))
    path = tmp_path / "new" / "tuning.json"
    tuning.write(path, written)
    assert tuning.read(path) == written
    # An entry a line: files are compared and merged by people.
    assert sum('"kernel"' in line for line in path.read_text().splitlines()) == 2
    tuning.write(path, Tuning())
    assert tuning.read(path) == Tuning()


def test_the_package_has_no_measurements_yet():
    assert tuning.read(tuning.PACKAGE_FILE) == Tuning()


def test_only_the_widths_that_were_measured_are_tuned():
    usual = triton_support.config("linear", HALF, 192, 768)
    assert usual == next(config for widest, config in CONFIGS["linear"]["default", "half"] if widest >= 192)
    with tuning.using(Tuning((LAUNCH, replace(LAUNCH, config=usual)))):
        # The first of two entries for one place holds.
        assert triton_support.config("linear", HALF, 192, 768) == CONFIG
        assert triton_support.config("linear", HALF, 192, 64, 768) == CONFIG
        for width, depth in ((192, 384), (128, 768), (256, 768)):
            assert triton_support.config("linear", HALF, width, depth) == triton_support.usual(
                "linear", "sm_90", "half", width
            )
        # Other products, other architectures, other kernels; widths that no vector load reads are a kind of their own.
        for other in (HALF._replace(kind="tf32"), HALF._replace(architecture="sm_80")):
            assert triton_support.config("linear", other, 192, 768) != CONFIG
        assert triton_support.config("input_gradient", HALF, 192, 768) != CONFIG
        unaligned = replace(LAUNCH, kind="unaligned half", width=46, depth=165)
        with tuning.using(Tuning((unaligned,))):
            assert triton_support.config("linear", HALF, 46, 165) == CONFIG
            # A tile of bf16 need not have room in fp32.
            for kind in ("ieee", "tf32"):
                single = HALF._replace(kind=kind, dtype=torch.float32)
                assert triton_support.config("linear", single, 46, 165) != CONFIG
    assert triton_support.config("linear", HALF, 192, 768) == usual


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", 'expected an object with "launches" and "preferences"'),
        ("no json", "expected a file of tuning entries"),
        ({"launch": []}, 'expected an object with "launches" and "preferences"'),
        ({"launches": {}}, "launches: expected a list, got dict"),
        ({"launches": [{"kernel": "linear"}]}, r"launches\[0\]: expected the fields kernel, architecture"),
        ({"launches": [LAUNCH, {"width": "wide"}]}, r"launches\[1\]\.width: expected a number, got 'wide'"),
        ({"launches": [{"kernel": 1}]}, r"launches\[0\]\.kernel: expected a text, got 1"),
        ({"launches": [{"config": {"block_m": 16}}]}, r"launches\[0\]\.config: expected the fields block_m, block_n"),
        ({"launches": [{"config": CONFIG._replace(block_m=48)._asdict()}]}, "expected powers of two"),
        ({"preferences": [{"milliseconds": {}}]}, "expected times by backend"),
        ({"preferences": [{"milliseconds": {"cuda": "fast"}}]}, r"milliseconds\.cuda: expected a number"),
    ],
)
def test_what_is_wrong_with_a_file_is_said(tmp_path, content, message):
    path = tmp_path / "tuning.json"
    if isinstance(content, dict):
        whole = {"launches": LAUNCH, "preferences": PREFERENCE}
        content = {
            name: [tuning._as_json(whole[name]) | entry if _partial(entry) else _plain(entry) for entry in entries]
            if isinstance(entries, list)
            else entries
            for name, entries in content.items()
        }
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(ValueError, match=f"tuning: {path}.*{message}"):
        tuning.read(path)


def _plain(entry):
    return entry if isinstance(entry, dict) else tuning._as_json(entry)


def _partial(entry):
    return isinstance(entry, dict) and entry != {"kernel": "linear"}


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(ValueError, match=r"nothing\.json: expected a file of tuning entries"):
        tuning.read(tmp_path / "nothing.json")


def test_the_file_of_the_user(tmp_path, monkeypatch, capsys):
    """It goes before the package's own; a mistake in it is one line of the command."""
    path = tmp_path / "tuning.json"
    monkeypatch.setenv(tuning.VARIABLE, str(path))
    monkeypatch.setattr(
        tuning, "read", lambda p, *source, f=tuning.read: Tuning((OLDER,)) if not source else f(p, *source)
    )
    for content, expected in ((Tuning((LAUNCH,)), CONFIG), (Tuning(), OLDER.config)):
        tuning.write(path, content)
        monkeypatch.setattr(tuning, "_chosen", None)
        assert triton_support.config("linear", HALF, 192, 768) == expected
    path.write_text("[]")
    monkeypatch.setattr(tuning, "_chosen", None)
    assert cli.main(["info"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("fastvit-kernels: FASTVIT_TUNING: ") and error.count("\n") == 1


@pytest.mark.parametrize("operator", ["pointwise_mlp", "depthwise_mlp", "global_attention"])
def test_an_entry_changes_launches_and_no_numbers(operator, monkeypatch):
    """In the interpreter: every kernel of a call with other tiles, each launched with them, within the rule."""
    case = next(case for case in inputs.CASES[operator] if "smallest" in case.tags)
    call = case.call(inputs.FP32)
    launched, places = [], []
    submit, config = triton_support.submit, triton_support.config

    def listen(kernel, grid, args, options):
        launched.append((options["BLOCK_M"], options["BLOCK_N"], options["BLOCK_K"], options["num_warps"]))
        submit(kernel, grid, args, options)

    def asked(*key):
        places.append((triton_support.place(*key), config(*key)))
        return places[-1][1]

    monkeypatch.setattr(triton_support, "submit", listen)
    monkeypatch.setattr(triton_support, "config", asked)

    def run():
        launched.clear()
        with use_backend("triton"), torch.no_grad():
            found = call.fresh()()
        return (found,) if isinstance(found, torch.Tensor) else tuple(found)

    with tuning.using(Tuning()):
        run()
        usual = list(launched)
    others = {
        place: used._replace(block_m=16, block_n=min(used.block_n, 32), block_k=min(used.block_k, 32), num_warps=2)
        for place, used in places
    }
    entries = tuple(Launch(*place, other, "test", 1.0, 2.0) for place, other in others.items())
    with tuning.using(Tuning(entries)):
        found = run()
    assert len(launched) == len(usual) and all(warps == 2 for *_, warps in launched) and launched != usual
    with use_backend("reference"), torch.no_grad():
        exact, low = call.fp64()(), call.fresh()()
    as_tuple = [(t,) if isinstance(t, torch.Tensor) else tuple(t) for t in (exact, low)]
    assert_within_rule(list(found), (list(as_tuple[0]), list(as_tuple[1])))


def test_no_size_is_part_of_a_place():
    """The batch and the resolution change nothing that is looked up."""
    places = []
    for batch, side in ((1, 4), (3, 6)):
        found = []
        places.append(found)
        with pytest.MonkeyPatch.context() as patch:
            config = triton_support.config
            patch.setattr(
                triton_support,
                "config",
                lambda *key, f=found, c=config: f.append(triton_support.place(*key)) or c(*key),
            )
            x, weight = torch.randn(batch, side * side, 16), torch.randn(16, 16)
            dw = torch.randn(16, 1, 3, 3)
            with use_backend("triton"), torch.no_grad():
                ops.pointwise_mlp(x, weight, None, weight, None, activation="gelu")
                ops.depthwise_mlp(x, weight, None, dw, None, weight, None, grid=(side, side), activation="gelu")
    assert places[0] == places[1] and len(places[0]) == 4
