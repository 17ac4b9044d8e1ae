"""load_checkpoint: formats, wrappers, reports and every way to fail."""

from __future__ import annotations

import argparse
import os
import pathlib
import sys

import plain_cvt
import pytest
import torch
from cvt_pairs import image, load_quietly, transformers_cvt
from torch import nn

from fastvit_kernels.models import CheckpointError, create_model, load_checkpoint
from fastvit_kernels.testing import relative_l2

THEIR_SIZES = {"depth": [1, 2, 3], "embed_dim": [16, 32, 48], "num_heads": [1, 2, 3]}
OUR_SIZES = {"depths": (1, 2, 3), "embed_dims": (16, 32, 48), "num_heads": (1, 2, 3)}


@pytest.fixture
def official(small_plain):
    """An official state dict."""
    return small_plain.state_dict()


def same(model, state_dict):
    return all(torch.equal(value, state_dict[name]) for name, value in model.state_dict().items())


def unchanged(model, action):
    """Runs an action that must fail without touching the model."""
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(CheckpointError) as caught:
        action()
    assert same(model, before)
    return str(caught.value)


def test_an_official_state_dict(small, official):
    model = small()
    report = load_checkpoint(model, official)
    assert same(model, official)
    assert report.source == "official" and report.complete and not report.wrapper and not report.notes
    assert sorted(report.loaded) == sorted(official)
    assert str(report) == f"{len(official)} entries loaded (official names)"


@pytest.mark.parametrize("wrapper", ["model_ema", "model", "state_dict", "model_state"])
def test_wrapped_in_a_training_checkpoint(small, official, wrapper):
    model = small()
    report = load_checkpoint(model, {"epoch": 300, wrapper: official, "optimizer": {"lr": 0.1}})
    assert same(model, official) and report.wrapper == (wrapper,)
    assert str(report) == f"{len(official)} entries loaded (official names under {wrapper})"


def test_averaged_weights_come_first_and_wrappers_nest(small, official):
    zeros = {name: torch.zeros_like(value) for name, value in official.items()}
    model = small()
    report = load_checkpoint(model, {"model": zeros, "model_ema": {"state_dict": official}})
    assert same(model, official) and report.wrapper == ("model_ema", "state_dict")


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_prefixes_of_wrapping_modules(small, official, prefix):
    model = small()
    assert load_checkpoint(model, {prefix + name: value for name, value in official.items()}).complete
    assert same(model, official)


def test_a_wrapped_model_is_read_back(small):
    trained = plain_cvt.randomize(small(), seed=7)
    model = small()
    assert load_checkpoint(model, nn.ModuleDict({"module": trained}).state_dict()).complete
    assert same(model, trained.state_dict())


def test_values_are_cast_to_the_models_dtype(small, official):
    model = small().double()
    load_checkpoint(model, {name: v.bfloat16() if v.is_floating_point() else v for name, v in official.items()})
    assert model.head.weight.dtype == torch.float64
    assert torch.equal(model.head.weight, official["head.weight"].bfloat16().double())


def test_batch_counters_may_be_absent_on_either_side(small, official):
    model = small()
    model.stage0.blocks[0].attn.conv_proj_q.bn.num_batches_tracked.fill_(5)
    without = {name: value for name, value in official.items() if not name.endswith("num_batches_tracked")}
    assert load_checkpoint(model, without).complete
    assert int(model.stage0.blocks[0].attn.conv_proj_q.bn.num_batches_tracked) == 5
    model.stage0.blocks[0].attn.conv_proj_q.bn.num_batches_tracked = None
    assert load_checkpoint(model, official).complete


@pytest.mark.parametrize("part", ["classifier", "backbone"])
def test_transformers_names(part):
    theirs = transformers_cvt(**THEIR_SIZES).float().eval()
    ours = create_model("cvt_13", 10, **OUR_SIZES, activation="gelu").eval()
    if part == "backbone":
        backbone = create_model("cvt_13", features_only=True, **OUR_SIZES, activation="gelu").eval()
        state_dict = theirs.cvt.state_dict()
        assert next(iter(state_dict)).startswith("encoder.")
        report = load_checkpoint(backbone, state_dict)
        expected = theirs.cvt(image(), output_hidden_states=True).hidden_states
        assert all(relative_l2(a, b.detach()) < 1 for a, b in zip(backbone(image()), expected, strict=True))
        assert relative_l2(backbone.stage2.cls_token, theirs.cvt.encoder.stages[2].cls_token) == 0
    else:
        report = load_checkpoint(ours, theirs.state_dict())
        assert len(report.loaded) == len(ours.state_dict())
    assert report.source == "transformers" and report.complete and report.notes == []


def test_transformers_weights_in_a_model_with_the_official_activation():
    theirs = transformers_cvt(**THEIR_SIZES)
    model = create_model("cvt_13", 10, **OUR_SIZES)
    with pytest.warns(UserWarning, match="transformers runs CvT with the exact GELU.*activation='gelu'"):
        report = load_checkpoint(model, theirs.state_dict())
    assert len(report.notes) == 1 and "activation='quick_gelu'" in report.notes[0]
    assert f"  note: {report.notes[0]}" in str(report)


def test_unknown_transformers_names_stay_visible(small):
    model = create_model("cvt_13", 10, **OUR_SIZES)
    state_dict = {
        **transformers_cvt(**THEIR_SIZES).state_dict(),
        "cvt.encoder.stages.0.layers.0.extra.weight": torch.ones(1),
    }
    report = load_quietly(model, state_dict, strict=False)
    assert report.unexpected == ["cvt.encoder.stages.0.layers.0.extra.weight"]


@pytest.mark.parametrize("overrides", [{"features_only": True}, {"num_classes": 0}], ids=["features", "no classifier"])
def test_what_a_model_was_built_without_is_no_error(small, official, overrides):
    report = load_checkpoint(small(**overrides), official)
    expected = {"head.weight", "head.bias"} | ({"norm.weight", "norm.bias"} if "features_only" in overrides else set())
    assert set(report.left_out) == expected and report.complete
    assert f"{len(expected)} left out of this model: " in str(report)


def test_another_number_of_classes(small, official):
    model = small(4)
    message = unchanged(model, lambda: load_checkpoint(model, official))
    assert "the given state dict does not fit the model; strict=False loads what does" in message
    assert "2 of another shape: head.weight (10, 48) here (4, 48), head.bias (10,) here (4,)" in message
    head = model.head.weight.clone()
    report = load_checkpoint(model, official, strict=False)
    assert report.mismatching == {"head.weight": ((10, 48), (4, 48)), "head.bias": ((10,), (4,))}
    assert not report.complete and torch.equal(model.head.weight, head)
    assert torch.equal(model.norm.weight, official["norm.weight"])


def test_missing_and_unexpected_entries(small, official):
    del official["stage2.cls_token"]
    official["stage9.weight"] = torch.ones(1)
    model = small()
    message = unchanged(model, lambda: load_checkpoint(model, official))
    assert "1 missing in the checkpoint: stage2.cls_token" in message
    assert "1 unknown to the model: stage9.weight" in message
    report = load_checkpoint(model, official, strict=False)
    assert report.missing == ["stage2.cls_token"] and report.unexpected == ["stage9.weight"]


def test_long_lists_are_cut(small, official):
    model = small()
    message = unchanged(model, lambda: load_checkpoint(model, {"head.bias": official["head.bias"]}))
    assert ", ..." in message and message.count("stage0.patch_embed") == 4


def test_the_wrong_model_is_an_error_in_any_case(small):
    model = small()
    other = {"conv1.weight": torch.ones(3)}
    assert "none of its entries does" in unchanged(model, lambda: load_checkpoint(model, other, strict=False))


def test_a_model_without_formats_of_its_own():
    model = nn.Linear(2, 3)
    assert load_checkpoint(model, {"model": {"weight": torch.ones(3, 2), "bias": torch.ones(3)}}).complete
    assert bool((model.weight == 1).all())


@pytest.mark.parametrize("kind", ["torch", "legacy torch", "safetensors"])
def test_files(small, official, tmp_path, kind):
    path = tmp_path / "weights"
    if kind == "safetensors":
        from safetensors.torch import save_file

        save_file(official, path)
    else:
        torch.save({"model": official}, path, _use_new_zipfile_serialization=kind == "torch")
    for source in (path, str(path)):
        model = small()
        assert load_checkpoint(model, source).complete
        assert same(model, official)


def test_a_missing_file(small, tmp_path):
    with pytest.raises(FileNotFoundError, match="no checkpoint file .*nowhere.pth"):
        load_checkpoint(small(), tmp_path / "nowhere.pth")


def test_a_directory(small, tmp_path):
    with pytest.raises(CheckpointError, match="is a directory, expected a checkpoint file"):
        load_checkpoint(small(), tmp_path)


@pytest.mark.parametrize("kind", ["torch", "legacy torch", "safetensors"])
@pytest.mark.parametrize("share", [0.001, 0.5, 0.99])
def test_files_that_were_cut_off(small, official, tmp_path, kind, share):
    path = tmp_path / "weights"
    if kind == "safetensors":
        from safetensors.torch import save_file

        save_file(official, path)
    else:
        torch.save(official, path, _use_new_zipfile_serialization=kind == "torch")
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    model = small()
    message = unchanged(model, lambda: load_checkpoint(model, path))
    assert message.startswith(f"{path} is no checkpoint, or cut off or damaged (")
    assert not message.endswith("()") and "weights_only" not in message


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "it is empty"),
        (b"<html>404 not found</html>", "it starts with b'<html>404 not fo', as no file of torch.save or"),
        (bytes(100), "it starts with b'\\x00\\x00"),
        (b"PK\x03\x04 and no more", "not a ZIP archive"),
        (b"\x80\x02\xff", "Unsupported operand 255"),
    ],
    ids=["empty", "text", "zeros", "zip", "pickle"],
)
def test_files_of_something_else(small, tmp_path, content, reason):
    path = tmp_path / "weights.pth"
    path.write_bytes(content)
    model = small()
    message = unchanged(model, lambda: load_checkpoint(model, path))
    assert message.startswith(f"{path} is no checkpoint, or cut off or damaged (")
    assert reason in message and "weights_only" not in message


class Planted:
    """Writes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (pathlib.Path.touch, (self.path,))


def test_code_in_a_file_is_not_run(small, official, tmp_path):
    trace, path = tmp_path / "trace", tmp_path / "weights.pth"
    torch.save({"model": official, "extra": Planted(trace)}, path)
    model = small()
    message = unchanged(model, lambda: load_checkpoint(model, path))
    assert "besides tensors and plain values; reading that could run code, so it is refused" in message
    assert not trace.exists()
    torch.load(path, weights_only=False)
    assert trace.exists()


def test_objects_in_a_file_are_named(small, official, tmp_path):
    path = tmp_path / "weights.pth"
    torch.save({"model": official, "args": argparse.Namespace(lr=0.1)}, path)
    model = small()
    assert "holds argparse.Namespace besides" in unchanged(model, lambda: load_checkpoint(model, path))


def test_safetensors_without_the_package(small, official, tmp_path, monkeypatch):
    from safetensors.torch import save_file

    save_file(official, tmp_path / "weights")
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(CheckpointError, match="the package safetensors is not installed"):
        load_checkpoint(small(), tmp_path / "weights")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "holds no state dict, but an empty one"),
        ({"model": {}}, "holds no state dict, but an empty one under model"),
        ({"model": nn.Linear(1, 1)}, "holds no state dict, but a Linear under model"),
        ({"epoch": 3}, "'epoch' is a int, expected a tensor; .* is looked for under model_ema, model, "),
        ({"state_dict": {"a": 1.0}}, "'a' under state_dict is a float, expected a tensor"),
    ],
)
def test_contents_without_a_state_dict(small, content, message):
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(small(), content)


@pytest.mark.parametrize("source", [None, 3, [1]])
def test_sources_of_another_type(small, source):
    with pytest.raises(TypeError, match=f"source: expected a path or a state dict, got {type(source).__name__}"):
        load_checkpoint(small(), source)


def test_a_path_like_object(small, official, tmp_path):
    class Entry:
        def __fspath__(self):
            return os.fspath(tmp_path / "weights")

    torch.save(official, tmp_path / "weights")
    assert load_checkpoint(small(), Entry()).complete
