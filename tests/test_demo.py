"""The demonstration: inputs, measurements, picture, and complete runs."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
import torch
from PIL import Image
from rich.console import Console
from torch import nn

import fastvit_kernels
from fastvit_kernels import cli
from fastvit_kernels.bench.measure import Plan, Times
from fastvit_kernels.demo import digits, hosts, images, picture
from fastvit_kernels.demo import run as demo
from fastvit_kernels.demo.errors import Disagreement, UserError
from fastvit_kernels.demo.measure import REST, BlockTime, logits, measure, precision
from fastvit_kernels.demo.memory import Memory, peak_memory
from fastvit_kernels.demo.results import ACCELERATED, STOCK, Agreement, Results, Setup
from fastvit_kernels.models import create_model, registry

SMALL = {"depths": (1, 2, 3), "embed_dims": (16, 32, 64), "num_heads": (1, 2, 4)}
SMALL_TRANSFORMERS = {"depth": [1, 2, 3], "embed_dim": [16, 32, 64], "num_heads": [1, 2, 4]}
MIB = 2**20


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def small_model(monkeypatch):
    """`cvt_small`, here and in transformers."""

    def build(**overrides):
        return create_model("cvt_13", **{**SMALL, **overrides})

    monkeypatch.setitem(registry._builders, "cvt_small", build)
    monkeypatch.setitem(hosts._TRANSFORMERS_CVT, "cvt_small", SMALL_TRANSFORMERS)


@pytest.fixture
def picture_file(tmp_path) -> Path:
    """A user's image: coloured noise, wider than high, with transparency."""
    pixels = numpy.random.default_rng(0).integers(0, 256, (60, 90, 4), dtype=numpy.uint8)
    path = tmp_path / "my [picture].png"
    Image.fromarray(pixels, "RGBA").save(path)
    return path


@pytest.fixture
def weights() -> nn.Module:
    """A small model with weights that every layer's result depends on."""
    torch.manual_seed(1)
    model = create_model("cvt_small", num_classes=7, backend="reference")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.3 if parameter.ndim < 2 else 2.0 / parameter[0].numel() ** 0.5)
        for name, buffer in model.named_buffers():
            if buffer.is_floating_point():
                buffer.uniform_(0.5, 1.5) if name.endswith("var") else buffer.normal_(0.0, 0.3)
    return model.eval()


def _batch(count: int = 2, size: int = 64) -> torch.Tensor:
    return images.to_batch(images.views(images.sample_photos(), size, count))


def _stock(checkpoint: Path | None = None, host: str = "fastvit", num_classes: int | None = 7) -> hosts.Stock:
    return hosts.stock_model(host, "cvt_small", checkpoint, num_classes, [_batch()])


# Images


def test_the_sample_photographs_are_read():
    photos = images.sample_photos()
    assert [photo.name for photo in photos] == ["china.jpg", "flower.jpg"]
    assert all(photo.image.size == (640, 427) for photo in photos)


def test_views_start_with_the_centre_and_are_repeatable():
    photos = images.sample_photos()
    first, again = images.views(photos, 56, 6), images.views(photos, 56, 6)
    assert all(view.size == (56, 56) for view in first)
    assert [view.tobytes() for view in first] == [view.tobytes() for view in again]
    assert len({view.tobytes() for view in first}) == 6
    # 64 high and 96 wide, of which the middle 56 are taken.
    resized = photos[0].image.resize((96, 64), Image.Resampling.BICUBIC)
    assert first[0].tobytes() == resized.crop((20, 4, 76, 60)).tobytes()


@pytest.mark.parametrize("size", [(3, 500), (500, 3), (1, 1)])
def test_views_of_extreme_formats(size):
    photo = images.Photo("extreme", Image.new("RGB", size))
    assert all(view.size == (32, 32) for view in images.views([photo], 32, 3))


def test_to_batch_normalises_into_channels_last():
    batch = images.to_batch([Image.new("RGB", (5, 4), (255, 0, 51))])
    assert batch.shape == (1, 3, 4, 5) and batch.is_contiguous(memory_format=torch.channels_last)
    expected = [(1 - 0.485) / 0.229, -0.456 / 0.224, (0.2 - 0.406) / 0.225]
    torch.testing.assert_close(batch[0, :, 3, 4], torch.tensor(expected))


def test_unusable_images_are_named(tmp_path, picture_file):
    cut = tmp_path / "cut.png"
    cut.write_bytes(picture_file.read_bytes()[:-2000])
    text = tmp_path / "text.png"
    text.write_text("no image")
    with pytest.raises(UserError, match=r"absent\.png: no such file"):
        images.read_photo(tmp_path / "absent.png")
    for path in (cut, text):
        with pytest.raises(UserError, match=rf"{path.name}: not a readable image"):
            images.read_photo(path)


# Weights


@pytest.mark.parametrize("host", hosts.HOSTS)
def test_random_weights_are_repeatable_and_calibrated(host):
    stock, again = _stock(host=host), _stock(host=host)
    norms = [m for m in stock.model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(norms) == 18 and all(norm.momentum == 0.1 for norm in norms)
    assert all(norm.running_mean.abs().max() > 1e-3 and (norm.running_var - 1).abs().max() > 1e-2 for norm in norms)
    assert all(map(torch.equal, stock.model.state_dict().values(), again.model.state_dict().values()))
    assert not stock.model.training


def test_calibration_averages_over_the_batches():
    first, second = _batch(4).chunk(2)
    one, two, both = (
        hosts.stock_model("fastvit", "cvt_small", None, 7, c) for c in ([first], [second], [first, second])
    )
    mean = "stage0.blocks.0.attn.conv_proj_k.bn.running_mean"
    expected = (one.model.state_dict()[mean] + two.model.state_dict()[mean]) / 2
    torch.testing.assert_close(both.model.state_dict()[mean], expected)


@pytest.mark.parametrize("file_name", ["weights.pth", "weights.safetensors"])
@pytest.mark.parametrize("host", hosts.HOSTS)
def test_a_checkpoint_of_our_names_loads_into_either_host(file_name, host, weights, tmp_path):
    path = tmp_path / file_name
    _save(weights.state_dict(), path)
    stock = _stock(path, host)
    assert stock.weights == f"weights of {file_name}"
    expected = weights
    if host == "transformers":
        expected = create_model("cvt_small", num_classes=7, backend="reference", activation="gelu").eval()
        expected.load_state_dict(weights.state_dict())
    x = _batch()
    with precision("fp32"):
        torch.testing.assert_close(logits(stock.model, x), logits(expected, x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("host", hosts.HOSTS)
def test_a_transformers_checkpoint_with_its_class_names(host, tmp_path):
    source = _stock(host="transformers", num_classes=3).model
    source.config.id2label = {0: "pagoda", 1: "dahlia", 2: "[neither]"}
    source.save_pretrained(tmp_path)
    stock = _stock(tmp_path / "model.safetensors", host, num_classes=None)
    assert stock.labels == {0: "pagoda", 1: "dahlia", 2: "[neither]"}
    # Our own model has the official activation otherwise; that it has another one here is said.
    assert bool(stock.notes) == (host == "fastvit")
    if host == "transformers":
        assert all(map(torch.equal, stock.model.state_dict().values(), source.state_dict().values()))
    x = _batch()
    with precision("fp32"):
        torch.testing.assert_close(logits(stock.model, x), logits(source.eval(), x), rtol=1e-4, atol=1e-5)


def _save(state_dict: dict[str, torch.Tensor], path: Path) -> None:
    if path.suffix == ".safetensors":
        from safetensors.torch import save_file

        save_file(state_dict, path)
    else:
        torch.save({"model": state_dict}, path)


def _truncated(path: Path, state_dict: dict[str, torch.Tensor]) -> str:
    _save(state_dict, path)
    path.write_bytes(path.read_bytes()[:-5000])
    return "cut off or damaged"


def _text(path: Path, state_dict: dict[str, torch.Tensor]) -> str:
    path.write_text("no checkpoint")
    return "no checkpoint"


def _absent(path: Path, state_dict: dict[str, torch.Tensor]) -> str:
    return "no such file"


def _other_classes(path: Path, state_dict: dict[str, torch.Tensor]) -> str:
    _save({**state_dict, "head.weight": torch.zeros(9, 64), "head.bias": torch.zeros(9)}, path)
    return "does not fit cvt_small: .*head.weight.*--num-classes 9 would fit"


def _other_depth(path: Path, state_dict: dict[str, torch.Tensor]) -> str:
    _save({name: value for name, value in state_dict.items() if not name.startswith("stage2.blocks.1.")}, path)
    return "does not fit cvt_small: .*missing in the checkpoint: stage2.blocks.1"


def _other_model(path: Path, state_dict: dict[str, torch.Tensor]) -> str:
    _save({"conv1.weight": torch.zeros(4)}, path)
    return "does not fit the model"


@pytest.mark.parametrize("make", [_truncated, _text, _absent, _other_classes, _other_depth, _other_model])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_an_unusable_checkpoint_is_one_clear_line(make, suffix, weights, tmp_path, capsys):
    path = tmp_path / f"weights{suffix}"
    message = make(path, weights.state_dict())
    assert cli.main(_arguments("--checkpoint", str(path), "--num-classes", "7", "--output", str(tmp_path / "out"))) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and str(path) in error
    assert re.search(message, error), error


def test_a_broken_configuration_beside_the_checkpoint(weights, tmp_path):
    _save(weights.state_dict(), tmp_path / "weights.pth")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json: not a transformers configuration"):
        _stock(tmp_path / "weights.pth")


# Measurements


class Sleeper(nn.Module):
    """Blocks that take a known share of the time."""

    def __init__(self) -> None:
        super().__init__()
        self.stage = nn.Module()
        self.stage.blocks = nn.ModuleList([nn.Linear(4, 4), nn.Linear(1500, 1500)])

    def forward(self, x):
        self.stage.blocks[0](x)
        self.stage.blocks[1](torch.ones(500, 1500))
        return x


def test_models_are_timed_in_turn():
    calls = []

    class Recorder(nn.Module):
        def __init__(self, name: str) -> None:
            super().__init__()
            self.name = name

        def forward(self, x):
            calls.append(self.name)
            sum(range(400_000))
            return x

    advanced = []
    models = {name: Recorder(name) for name in "ab"}
    times, blocks = measure(models, torch.ones(1), Plan(6, 60.0, sample=0.0, settle=0.0), lambda: advanced.append(1))
    assert [times[name].rounds for name in "ab"] == [6, 6] and len(advanced) == 6
    # Two calls a turn, of which the first is not timed; each round starts one model later.
    assert "".join(calls[-8:]) in ("aabbbbaa", "bbaaaabb") and calls.count("a") == calls.count("b")
    assert [block.name for block in blocks] == [REST]


def test_block_times_know_every_block_and_leave_no_hooks():
    models = {STOCK: Sleeper(), ACCELERATED: Sleeper()}
    with precision("fp32"):
        _, blocks = measure(models, torch.ones(2, 4), Plan(5, 60.0, sample=0.0, settle=0.0), lambda: None)
    assert [block.name for block in blocks] == ["blocks.0", "blocks.1", REST]
    small, large, rest = blocks
    assert all(large.seconds[v] > 5 * small.seconds[v] > 0 and rest.seconds[v] > 0 for v in models)
    assert not any(m._forward_hooks or m._forward_pre_hooks for model in models.values() for m in model.modules())


@pytest.mark.parametrize("host", hosts.HOSTS)
def test_blocks_of_both_hosts_are_found(host):
    model = _stock(host=host).model
    with precision("fp32"):
        _, blocks = measure({STOCK: model}, _batch(), Plan(5, 60.0, sample=0.0, settle=0.0), lambda: None)
    names = [block.name for block in blocks]
    prefix, embedding, block = (
        ("stage", "patch_embed", "blocks") if host == "fastvit" else ("stages.", "embedding", "layers")
    )
    expected = [
        f"{prefix}{s}.{part}"
        for s, d in enumerate((1, 2, 3))
        for part in (embedding, *(f"{block}.{i}" for i in range(d)))
    ]
    assert names == [*expected, REST]


def test_peak_memory_sees_what_a_forward_allocates(tmp_path):
    torch.save(nn.Upsample(scale_factor=8), tmp_path / "model.pt")
    torch.save(torch.ones(1, 3, 512, 512), tmp_path / "input.pt")
    memory = peak_memory(tmp_path / "model.pt", tmp_path / "input.pt", STOCK, "fp32", 1)
    # The result is 3 x 4096 x 4096 floats, 192 MiB; a small pass before has left a little room.
    assert 185 * MIB < memory.rise < 260 * MIB
    assert memory.resting > 50 * MIB


def test_a_failing_measurement_says_why(tmp_path):
    with pytest.raises(RuntimeError, match=r"memory measurement of the stock model failed[\s\S]*absent\.pt"):
        peak_memory(tmp_path / "absent.pt", tmp_path / "absent.pt", STOCK, "fp32", 1)


# Agreement


def _agreement(accelerated: torch.Tensor, stock: torch.Tensor, dtype: str = "fp32", to_fp64=(1e-7, 1e-7)) -> Agreement:
    difference = float((accelerated - stock).norm() / stock.norm())
    return Agreement(dtype, stock, accelerated, difference, dict(zip((STOCK, ACCELERATED), to_fp64, strict=True)))


def test_agreement_in_fp32():
    stock = torch.randn(2, 50)
    assert not _agreement(stock * (1 + 9e-6), stock).problems
    assert "relative L2" in _agreement(stock * (1 + 2e-5), stock).problems[0]
    assert "relative L2" in _agreement(stock * float("nan"), stock).problems[0]
    # Two scores closer than the allowed error change places.
    close = torch.arange(50.0)[None]
    close[0, 49] = 48 + 1e-5
    swapped = close.clone()
    swapped[0, 48], swapped[0, 49] = close[0, 49], close[0, 48]
    assert _agreement(swapped, close).problems == [
        "top-5 classes [[48, 49, 47, 46, 45]], expected [[49, 48, 47, 46, 45]]"
    ]


def test_agreement_in_bf16_compares_with_the_stock_models_own_error():
    stock = torch.randn(2, 50)
    assert not _agreement(stock * 1.01, stock, "bf16", (1e-2, 1.9e-2)).problems
    assert _agreement(stock * 1.01, stock, "bf16", (1e-2, 2.1e-2)).problems
    assert _agreement(stock * 1.01, stock, "bf16", (1e-2, float("nan"))).problems


# Picture


def _results(images_: list[str], classes: int = 10) -> Results:
    torch.manual_seed(0)
    scores = torch.randn(len(images_), classes)
    times = {v: Times(1.0, 1.1, 1.2, 0.9, 5, 1) for v in (STOCK, ACCELERATED)}
    return Results(
        Setup("cvt_small", "fastvit", "random weights", "fp32", 64, 1, images_),
        _agreement(scores, scores),
        {1: times, 4: times},
        [
            BlockTime("stage0.blocks.0", {STOCK: 0.2, ACCELERATED: 0.1}),
            BlockTime(REST, {STOCK: 0.1, ACCELERATED: 0.05}),
        ],
        {STOCK: Memory(100 * MIB, 150 * MIB), ACCELERATED: Memory(110 * MIB, 120 * MIB)},
        4,
    )


@pytest.mark.parametrize("count", [1, 5])
def test_the_picture_is_a_full_png(count, tmp_path):
    photos = images.views(images.sample_photos(), 64, count)
    results = _results([f"{index}.jpg" for index in range(count)], classes=3)
    picture.draw(results, photos, {0: "a very long class name that has to be cut"}, tmp_path / "picture.png")
    _check_picture(tmp_path / "picture.png")


def _check_picture(path: Path) -> None:
    assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    with Image.open(path) as opened:
        opened.load()
        image = opened.convert("RGB")
    assert image.width >= 1200 and image.height >= 800
    pixels = numpy.asarray(image).reshape(-1, 3)
    colours, counts = numpy.unique(pixels, axis=0, return_counts=True)
    # Photographs have many colours, and both variants have bars in theirs.
    assert len(colours) > 1000
    found = dict(zip(map(tuple, colours.tolist()), counts.tolist(), strict=True))
    for colour in picture.COLOURS.values():
        assert found.get(tuple(bytes.fromhex(colour[1:])), 0) > 2000


# Complete runs


def _arguments(*more: str) -> list[str]:
    return [
        "demo",
        "--model",
        "cvt_small",
        "--size",
        "64",
        "--batch",
        "1",
        "2",
        "--rounds",
        "3",
        "--threads",
        "1",
        *more,
    ]


def test_a_run_on_the_users_image_and_checkpoint(weights, picture_file, tmp_path, capsys):
    checkpoint, output = tmp_path / "weights.safetensors", tmp_path / "new" / "output"
    _save(weights.state_dict(), checkpoint)
    (tmp_path / "config.json").write_text(json.dumps({"id2label": {index: f"kind-{index}" for index in range(7)}}))
    threads = torch.get_num_threads()
    code = cli.main(_arguments("--image", str(picture_file), "--checkpoint", str(checkpoint), "--output", str(output)))
    captured = capsys.readouterr()
    assert code == 0, captured.err
    assert torch.get_num_threads() == threads
    _check_picture(output / "comparison.png")
    figures = json.loads((output / "results.json").read_text())

    x = images.to_batch(images.views([images.read_photo(picture_file)], 64, 1))
    with precision("fp32"):
        expected = logits(weights, x)[0].topk(5).indices.tolist()
    assert figures["top"] == {STOCK: [expected], ACCELERATED: [expected]}
    assert figures["relative_l2"]["accelerated_to_stock"] <= 1e-5
    replaced = len(fastvit_kernels.accelerate(weights, inference=True).replaced)
    assert figures["modules_replaced"] == replaced >= 10
    assert set(figures["seconds_per_call"]) == {"1", "2"}
    assert all(figures["memory"]["bytes"][v]["peak"] > 50 * MIB for v in (STOCK, ACCELERATED))

    out = " ".join(captured.out.split())
    for text in (
        "relative L2 error of the logits",
        f"kind-{expected[0]}",
        "my [picture].png",
        f"accelerate: {replaced} modules replaced, 0 left alone",
        "Milliseconds per image",
        "stage2.blocks.1",
        "pointwise_mlp",
        "peak resident memory",
        "logits identical bit for bit",
        "weights of weights.safetensors",
        "360 held-out handwritten digits",
    ):
        assert text in out
    assert "random weights" not in out


def test_the_command_in_its_own_process(tmp_path):
    command = [sys.executable, "-m", "fastvit_kernels.cli", "demo"]
    command += ["--size", "64", "--batch", "2", "--rounds", "3", "--threads", "1"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "random weights: the classes mean nothing, the numbers must agree" in " ".join(done.stdout.split())
    assert "flower.jpg" in done.stdout and "stage2.blocks.9" in done.stdout
    _check_picture(tmp_path / "demo_output" / "comparison.png")


def test_held_out_digits_are_recognised_both_ways():
    result = digits.recognise()
    assert len(result.labels) == 360 and min(result.right(v) for v in (STOCK, ACCELERATED)) >= 0.97 * 360
    assert torch.equal(result.found[STOCK], result.found[ACCELERATED])


def test_a_network_that_recognises_other_digits_stops_the_run(tmp_path, monkeypatch):
    def spoil(model, inference):
        with torch.no_grad():
            model.get_submodule("head").bias[3] += 100

    monkeypatch.setattr(digits, "accelerate", spoil)
    monkeypatch.setattr(demo, "peak_memory", lambda *_: Memory(1, 2))
    with pytest.raises(Disagreement, match="other handwritten digits"):
        _quiet_run(tmp_path)


def _quiet_run(tmp_path: Path, **options) -> Results:
    settings = {"model": "cvt_small", "size": 64, "batches": (1,), "rounds": 1, "output": tmp_path, **options}
    return demo.run(demo.Options(**settings), Console(quiet=True))


def test_transformers_in_bf16(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "peak_memory", lambda *_: Memory(1, 2))
    results = _quiet_run(tmp_path, host="transformers", dtype="bf16")
    assert results.setup.conditions == "bf16, 64 px, 1 thread"
    assert results.blocks[1].name == "stages.0.layers.0"
    assert results.replaced >= 6
    # The scores really were rounded.
    assert all(1e-4 < error < 0.1 for error in results.agreement.to_fp64.values())


def test_wrong_numbers_stop_the_run_before_any_time_is_taken(tmp_path, monkeypatch, capsys):
    def spoil(model, inference):
        report = accelerate(model, inference=inference)
        with torch.no_grad():
            model.get_submodule("head").bias[3] += 0.01
        return report

    accelerate = demo.accelerate
    monkeypatch.setattr(demo, "accelerate", spoil)
    monkeypatch.setattr(demo, "measure", None)
    with pytest.raises(Disagreement, match="relative L2 error of the logits"):
        _quiet_run(tmp_path)
    assert cli.main(_arguments("--output", str(tmp_path))) == 1
    assert "disagrees with the stock model" in capsys.readouterr().err
    assert not (tmp_path / "comparison.png").exists()


def test_a_restore_that_changes_anything_is_found(tmp_path, monkeypatch):
    def spoil(model):
        with torch.no_grad():
            model.get_submodule("head").bias[3] *= 1 + 1e-6
            model.get_submodule("head").bias[3] += 1e-6

    monkeypatch.setattr(demo, "restore", spoil)
    monkeypatch.setattr(demo, "peak_memory", lambda *_: Memory(1, 2))
    with pytest.raises(Disagreement, match="restore"):
        _quiet_run(tmp_path)


def test_an_output_that_is_a_file_is_a_user_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file: cannot be made a folder"):
        _quiet_run(tmp_path, output=tmp_path / "file")
