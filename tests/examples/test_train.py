"""The example trainer: its steps, its interruptions, its data, its messages, and the checkpoint that it made."""

from __future__ import annotations

import csv
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy
import pytest
import torch
import train
from image_data import augmented
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from fastvit_kernels.demo import digits
from fastvit_kernels.testing import assert_within_rule

ROOT = Path(__file__).parents[2]
TINY = ("depths=(1,1)", "embed_dims=(8,16)", "num_heads=(1,2)", "patch_sizes=(7,3)", "patch_strides=(4,2)")
TINY += ("patch_paddings=(2,1)",)


def _arguments(output: Path, *more: str) -> list[str]:
    overrides = [word for override in TINY for word in ("--override", override)]
    usual = ["--size", "16", "--epochs", "2", "--batch", "256", "--device", "cpu"]
    return [*overrides, *usual, "--output", str(output), *more]


def _train(output: Path, *more: str) -> None:
    assert train.main(_arguments(output, *more)) == 0


def _log(folder: Path) -> list[dict[str, str]]:
    with (folder / "log.csv").open() as file:
        return [{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(file)]


def _same_run(first: Path, second: Path) -> None:
    assert _log(first) == _log(second)
    weights, others = (load_file(folder / "model.safetensors") for folder in (first, second))
    assert weights.keys() == others.keys()
    assert all(torch.equal(weights[name], others[name]) for name in weights)


def _trainer(output: Path, *more: str) -> train.Trainer:
    options = train.parser().parse_args(_arguments(output, "--batch", "16", *more))
    return train.Trainer(options, torch.device("cpu"), 0, 1)


# Steps


def test_steps_of_stock_and_fused_are_within_the_numerics_rule(tmp_path):
    weights, losses = [], []
    for flags, dtype in ((), torch.float32), (("--stock",), torch.float32), (("--stock",), torch.float64):
        trainer = _trainer(tmp_path, *flags)
        trainer.model.to(dtype)
        # AdamW divides by gradients however small, and would show the rounding of those alone.
        trainer.optimizer = torch.optim.SGD(trainer.model.parameters())
        batches = [(images.to(dtype), labels) for images, labels in list(trainer.train_loader)[:3]]
        trainer.options.rate, trainer.options.warmup = 0.1, 0
        losses.append([trainer.train_step([batch]) for batch in batches])
        weights.append(torch.cat([p.detach().flatten() for p in trainer.model.parameters()]))
    fused, stock, exact = weights
    assert_within_rule(fused, (exact, stock), name="weights")
    assert losses[0] == pytest.approx(losses[2], rel=1e-5) and losses[2][0] != losses[2][-1]


def test_two_small_batches_make_the_gradient_of_a_large_one(tmp_path):
    found = []
    for accumulate in (1, 2):
        # Statistics of the batch norms differ between batch sizes; in eval mode they do not enter.
        trainer = _trainer(tmp_path, "--augment", "0", "--clip", "0")
        trainer.model.eval()
        trainer.optimizer = torch.optim.SGD(trainer.model.parameters(), lr=0.1)
        images, labels = next(iter(trainer.train_loader))
        trainer.train_step(list(zip(images.chunk(accumulate), labels.chunk(accumulate), strict=True)))
        found.append(torch.cat([p.detach().flatten() for p in trainer.model.parameters()]))
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-6)


def test_the_gradient_is_clipped(tmp_path):
    trainer = _trainer(tmp_path, "--clip", "0.01")
    trainer.optimizer = torch.optim.SGD(trainer.model.parameters(), lr=1.0)
    trainer.optimizer.zero_grad = lambda set_to_none: None
    trainer.train_step([next(iter(trainer.train_loader))])
    norm = torch.stack([p.grad.norm() for p in trainer.model.parameters() if p.grad is not None]).norm()
    torch.testing.assert_close(norm, torch.tensor(0.01), rtol=1e-3, atol=0)


def test_checkpointed_activations_change_no_gradient(tmp_path):
    found = []
    for flags in (), ("--checkpoint-activations",):
        trainer = _trainer(tmp_path, *flags)
        trainer.train_step([next(iter(trainer.train_loader))])
        found.append(trainer.model.state_dict())
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0] if "num_batches" not in name)


def test_the_rate_warms_up_and_falls_to_zero():
    options = train.parser().parse_args(["--output", "x", "--epochs", "10", "--warmup", "2", "--rate", "1"])
    rates = [train.rate_at(step, options, 5) for step in range(50)]
    assert rates[:10] == pytest.approx([0.1 * step for step in range(1, 11)])
    assert rates[10] == 1 and rates[10:] == sorted(rates[10:], reverse=True) and rates[-1] < 0.01


def test_augmentation_is_repeatable_and_of_strength_zero_nothing():
    images = torch.rand(6, 1, 12, 12, generator=torch.Generator().manual_seed(0))

    def run(strength: float, flip: bool = False) -> torch.Tensor:
        return augmented(images, strength, flip, torch.Generator().manual_seed(1))

    torch.testing.assert_close(run(0.0), images)
    assert torch.equal(run(1.0), run(1.0)) and not torch.allclose(run(1.0), images, atol=1e-2)
    mirrored = run(0.0, True)
    flipped = [bool(torch.allclose(a, b.flip(-1), atol=1e-5)) for a, b in zip(mirrored, images, strict=True)]
    assert 0 < sum(flipped) < 6
    torch.testing.assert_close(mirrored[~torch.tensor(flipped)], images[~torch.tensor(flipped)])


# Interruptions


def test_a_stopped_run_resumes_to_the_same_numbers(tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    more = ("--ema", "0.9", "--accumulate", "2", "--batch", "128", "--amp", "bf16")
    more += ("--override", "drop_rate=0.2")
    _train(whole, *more)
    # In the middle of the first epoch, at its end, and in the second.
    for index, stop in enumerate(("2", "5", "7")):
        _train(parts, *more, "--stop-after", stop, *(["--resume"] if index else []))
    assert not (parts / "model.safetensors").exists()
    _train(parts, *more, "--resume")
    _same_run(whole, parts)
    for name in ("curves.png", "last.pt"):
        assert (whole / name).stat().st_size > 1000


def test_a_killed_run_resumes_to_the_same_numbers(tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    _train(whole, "--epochs", "12")
    command = [sys.executable, str(ROOT / "examples" / "train.py")]
    command += _arguments(killed, "--epochs", "12", "--save-every", "2", "--threads", "1")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    while not (killed / "log.csv").exists() and process.poll() is None:
        time.sleep(0.01)
    while not (killed / "last.pt").exists() and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert len(_log(killed)) < 12
    _train(killed, "--epochs", "12", "--save-every", "2", "--resume")
    _same_run(whole, killed)


def test_resuming_with_other_options_names_them(tmp_path, capsys):
    _train(tmp_path, "--stop-after", "1")
    assert train.main(_arguments(tmp_path, "--resume", "--rate", "0.5")) == 2
    assert "begun with other options: rate 0.001 -> 0.5" in capsys.readouterr().err


# Image folders


@pytest.fixture
def photos(tmp_path) -> Path:
    """Red and green images of odd formats."""
    for label, colour in enumerate([(200, 30, 30), (30, 200, 30)]):
        folder = tmp_path / "photos" / ("red", "green")[label]
        folder.mkdir(parents=True)
        for index in range(10):
            noise = numpy.random.default_rng(index).integers(-25, 25, (20 + index, 30, 3))
            pixels = (numpy.array(colour) + noise).astype(numpy.uint8)
            Image.fromarray(pixels).save(folder / f"{index}.{('png', 'jpg')[index % 2]}")
    return tmp_path / "photos"


def test_an_image_folder_is_learnt(photos, tmp_path):
    more = ("--data", str(photos), "--batch", "8", "--epochs", "4", "--warmup", "0", "--rate", "0.01", "--flip")
    _train(tmp_path / "run", *more)
    assert float(_log(tmp_path / "run")[-1]["accuracy"]) == 1.0
    with safe_open(tmp_path / "run" / "model.safetensors", "pt") as file:
        assert '"classes": ["green", "red"]' in file.metadata()["fastvit_kernels"]


def test_a_broken_image_is_named(photos, tmp_path, capsys):
    for path in (photos / "red").iterdir():
        path.write_bytes(b"no image")
    assert train.main(_arguments(tmp_path / "run", "--data", str(photos), "--batch", "8")) == 2
    assert "not a readable image" in capsys.readouterr().err


# Messages


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--data", "absent"], "--data absent: no such folder"),
        (["--model", "cvt_14"], "unknown model 'cvt_14'"),
        (["--override", "wings=2"], "wings"),
        (["--override", "depths"], "--override depths: expected KEY=VALUE"),
        (["--override", "num_heads=(3,2)"], "--model cvt_13: "),
        (["--batch", "0"], "--batch: expected at least 1, got 0"),
        (["--batch", "4000"], "--batch 4000 x --accumulate 1: more than the 1437 images"),
        (["--smoothing", "1"], "--smoothing: expected from 0 to below 1, got 1"),
        (["--amp", "fp16"], "--amp fp16: only on CUDA"),
        (["--resume"], "--resume: there is no checkpoint"),
    ],
)
def test_bad_input_is_one_clear_line(more, message, tmp_path, capsys):
    assert train.main(_arguments(tmp_path, *more)) == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("train.py: ") and "Traceback" not in error


def test_a_folder_with_a_run_is_not_overwritten_unasked(tmp_path, capsys):
    _train(tmp_path, "--stop-after", "1")
    assert train.main(_arguments(tmp_path)) == 2
    assert "holds a run already" in capsys.readouterr().err
    _train(tmp_path, "--stop-after", "1", "--overwrite")


# The checkpoint that the demonstration shows


@pytest.mark.parametrize("backend", [None, "reference"])
def test_the_committed_checkpoint_reaches_its_logged_accuracy(backend):
    logged = {name: _log_of(name)[-1] for name in ("fused", "stock")}
    assert all(float(row["accuracy"]) >= 0.97 for row in logged.values())
    assert digits.CHECKPOINT.stat().st_size <= 2 * 2**20
    model, about = digits.load_network(backend=backend)
    _, held_out = digits.read_digits()
    right = int((digits.classify(model, held_out.images, about["size"]) == held_out.labels).sum())
    assert right / len(held_out.labels) == float(logged["fused"]["accuracy"])


def _log_of(name: str) -> list[dict[str, str]]:
    with (ROOT / "examples" / "digits" / f"{name}.csv").open() as file:
        return list(csv.DictReader(file))


def test_no_digit_is_both_learnt_and_held_out():
    learnt, held_out = digits.read_digits()
    assert len(learnt.labels) == 1437 and len(held_out.labels) == 360
    seen = {image.numpy().tobytes() for image in learnt.images}
    assert not any(image.numpy().tobytes() in seen for image in held_out.images)
