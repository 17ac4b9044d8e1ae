"""SegFormer's structure, outputs and checkpoint formats, and its head, whose linears come before the enlarging."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from cvt_pairs import image
from pyramid_pairs import SHALLOW, SMALL, beside_transformers, small, small_segformer
from torch import nn

from fastvit_kernels import accelerate
from fastvit_kernels.models import CheckpointError, create_model, list_models, load_checkpoint
from fastvit_kernels.testing import relative_l2


def test_names():
    assert list_models("segformer*") == [f"segformer_b{v}" for v in range(6)]


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("segformer_b0", 3_719_027),
        ("segformer_b1", 13_682_131),
        ("segformer_b2", 27_361_235),
        ("segformer_b3", 47_237_075),
        ("segformer_b4", 64_007_635),
        ("segformer_b5", 84_607_955),
    ],
)
def test_parameters(name, parameters):
    with torch.device("meta"):
        assert sum(p.numel() for p in create_model(name, 19).parameters()) == parameters


@pytest.mark.parametrize(("h", "w"), [(29, 29), (65, 97)])
def test_one_pixel_for_four_by_four(h, w):
    model, x = small_segformer().eval(), image(2, h, w)
    with torch.no_grad():
        y = model(x)
        assert y.shape == (2, 10, -(-h // 4), -(-w // 4))
        assert model(x[:0]).shape == (0, *y.shape[1:])
        features = small_segformer(0).eval()
        load_checkpoint(features, model.state_dict())
        assert relative_l2(model.decode_head.linear_pred(features(x)), y) <= 1e-6
        backbone = small_segformer(features_only=True).eval()
        assert load_checkpoint(backbone, model.state_dict()).complete
        assert all(torch.equal(a, b) for a, b in zip(backbone(x), model.backbone(x), strict=True))


@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "batch statistics"])
def test_the_exchange_changes_nothing(training):
    """With a hook somebody may look at the enlarged maps, so that they are made."""
    exchanged = small_segformer().double().train(training)
    joined = copy.deepcopy(exchanged)
    joined.decode_head.linear_c2.register_forward_hook(lambda *arguments: None)
    assert not exchanged.decode_head.exchange_obstacles() and len(joined.decode_head.exchange_obstacles()) == 1
    results = []
    for model in (exchanged, joined):
        x = image(dtype=torch.float64).requires_grad_()
        y = model(x)
        y.square().sum().backward()
        results.append([y.detach(), x.grad, *(p.grad for p in model.decode_head.parameters()), *model.buffers()])
    scale = max(float(p.grad.norm()) for p in joined.parameters())
    for found, expected in zip(*results, strict=True):
        # In front of batch statistics biases have no gradient but rounding noise.
        assert float((found - expected).double().norm()) <= 1e-12 * (float(expected.double().norm()) + scale)


@pytest.mark.parametrize("part", ["linear_fuse", "linear_fuse.conv", "linear_c1", "linear_c3.proj"])
def test_what_is_watched_is_called(part):
    model, seen = small_segformer().eval(), []
    with torch.no_grad():
        expected = model(image())
        model.decode_head.get_submodule(part).register_forward_hook(lambda *arguments: seen.append(part))
        assert relative_l2(model(image()), expected) <= 1e-5 and seen == [part]


def test_the_joined_maps_are_never_made():
    """The largest intermediate of the original head has four times the channels of any here."""
    model, sizes = small_segformer().eval(), []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            sizes.extend(t.shape[1] for t in [out] if isinstance(t, torch.Tensor) and t.ndim == 4)
            return out

    with torch.no_grad():
        maps = model.backbone(image())
        with Watch():
            model.decode_head(maps)
    assert sizes and max(sizes) < 4 * 24


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_half_precision(dtype):
    model, x = small_segformer().eval(), image()
    with torch.no_grad():
        expected = model(x)
        y = model.to(dtype)(x.to(dtype))
    assert y.dtype == dtype and relative_l2(y, expected) < 16 * torch.finfo(dtype).eps


def test_every_parameter_trains():
    model = small_segformer()
    y = F.interpolate(model(image()), (64, 48), mode="bilinear")
    F.cross_entropy(y, torch.zeros(2, 64, 48, dtype=torch.long)).backward()
    assert all(bool(p.grad.isfinite().all()) for p in model.parameters())


def test_dropout_works_in_training_only():
    model, x = small_segformer(decoder_drop_rate=0.5), image()
    with torch.no_grad():
        assert not torch.equal(model(x), model(x))
        assert torch.equal(model.eval()(x), model(x))


def test_accelerated_and_repeated():
    model, x = small_segformer().eval(), image()
    with torch.no_grad():
        expected = model(x)
        accelerate(model, inference=True)
        for _ in range(3):
            assert relative_l2(model(x), expected) <= 1e-5
        assert model._repeater.recorded == 1


@pytest.mark.parametrize("kind", ["modules", "file"])
def test_transformers_names(tmp_path, kind):
    ours, theirs = beside_transformers("segformer_b0", "SegformerForSemanticSegmentation")
    source = theirs.state_dict()
    if kind == "file":
        theirs.save_pretrained(tmp_path)
        source = tmp_path / "model.safetensors"
    model = create_model("segformer_b0", 10, depths=SHALLOW, eps="transformers").double()
    report = load_checkpoint(model, source)
    assert report.source == "transformers" and report.complete and not report.left_out and not report.notes
    expected = ours.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())


def test_an_official_checkpoint():
    """With the second classifier that the official head inherits and never calls."""
    official = {**small_segformer().state_dict(), "decode_head.conv_seg.weight": torch.ones(10, 128, 1, 1)}
    model = small_segformer()
    nn.init.zeros_(model.decode_head.linear_c1.proj.weight)
    report = load_checkpoint(model, {"state_dict": official, "meta": {"epoch": 1}})
    assert report.source == "official" and report.complete and report.left_out == ["decode_head.conv_seg.weight"]
    assert all(torch.equal(value, official[name]) for name, value in model.state_dict().items())


def test_a_classifiers_checkpoint_fills_the_backbone():
    classifier, model = small(name="mit_b0"), small_segformer()
    assert load_checkpoint(model.backbone, classifier.state_dict()).left_out == ["head.weight", "head.bias"]
    state = classifier.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in model.backbone.state_dict().items())
    with pytest.raises(CheckpointError, match="none of its entries does"):
        load_checkpoint(model, classifier.state_dict())


def test_epsilons_reach_the_backbone():
    assert create_model("segformer_b0", eps="transformers", **SMALL).backbone.eps == (1e-5,) * 4
