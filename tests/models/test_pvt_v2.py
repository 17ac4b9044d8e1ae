"""PVTv2's and MiT's structure, inputs, outputs and checkpoint formats."""

from __future__ import annotations

import copy
import pickle

import plain_cvt
import pytest
import torch
from cvt_pairs import image
from pyramid_pairs import SHALLOW, SMALL, beside_timm, beside_transformers, small
from timm_host import load_timm
from torch import nn

from fastvit_kernels import accelerate, explain, restore
from fastvit_kernels.models import create_model, list_models, load_checkpoint
from fastvit_kernels.models.pvt_v2 import NormEps
from fastvit_kernels.nn import DenseLinear, DropPath, MixFFN, PatchEmbedding, SpatialReductionAttention
from fastvit_kernels.testing import relative_l2


def test_names():
    assert list_models("pvt_v2*") == [f"pvt_v2_{v}" for v in ("b0", "b1", "b2", "b2_li", "b3", "b4", "b5")]
    assert list_models("mit*") == [f"mit_b{v}" for v in range(6)]


@pytest.mark.parametrize(
    ("name", "entries", "parameters"),
    [
        ("pvt_v2_b0", 178, 3_666_760),
        ("pvt_v2_b1", 178, 14_009_000),
        ("pvt_v2_b2", 334, 25_362_856),
        ("pvt_v2_b2_li", 346, 22_553_512),
        ("pvt_v2_b3", 574, 45_238_696),
        ("pvt_v2_b4", 834, 62_556_072),
        ("pvt_v2_b5", 1054, 81_956_008),
        ("mit_b0", 178, 3_576_392),
        ("mit_b1", 178, 13_664_424),
        ("mit_b2", 334, 24_709_288),
        ("mit_b3", 574, 44_585_128),
        ("mit_b4", 834, 61_355_688),
        ("mit_b5", 1054, 81_956_008),
    ],
)
def test_entries_and_parameters(name, entries, parameters):
    with torch.device("meta"):
        model = create_model(name)
        assert len(model.state_dict()) == entries
        assert sum(p.numel() for p in model.parameters()) == parameters
        if name.startswith("pvt"):
            shapes = {key: value.shape for key, value in load_timm().create_model(name).state_dict().items()}
            assert {key: value.shape for key, value in as_timm(model.state_dict()).items()} == shapes


def as_timm(official):
    """timm's own conversion of the official names."""
    from timm.models.pvt_v2 import checkpoint_filter_fn

    load_timm()
    return checkpoint_filter_fn(official, None)


def same(model, state_dict):
    return all(torch.equal(value, state_dict[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("name", ["pvt_v2_b0", "pvt_v2_b2_li"])
def test_to_timm_and_back(name):
    """timm converts our names as official ones; what it has then comes back as it was."""
    load_timm()
    official = small(name=name).state_dict()
    theirs = load_timm().create_model(name, num_classes=10, **SMALL)
    theirs.load_state_dict(as_timm(official), strict=True)
    model = plain_cvt.randomize(small(name=name), seed=5)
    report = load_checkpoint(model, {"state_dict": theirs.state_dict()})
    assert same(model, official) and report.source == "timm" and report.complete and not report.notes


def test_official_names_pass_through():
    official = plain_cvt.randomize(small(), seed=4).state_dict()
    model = small()
    report = load_checkpoint(model, {"model": {f"module.{name}": value for name, value in official.items()}})
    assert same(model, official) and report.source == "official" and report.complete and not report.notes


@pytest.mark.parametrize(
    ("name", "kind"),
    [("pvt_v2_b0", "PvtV2ForImageClassification"), ("mit_b0", "SegformerForImageClassification")],
    ids=["pvt_v2", "mit"],
)
@pytest.mark.parametrize("part", ["modules", "file", "backbone"])
def test_transformers_names(tmp_path, name, kind, part):
    """Of the modules and of the files, which differ for SegFormer; keys and values are joined."""
    config = {} if name.startswith("pvt") else {"mlp_ratios": [4, 4, 4, 4]}
    ours, theirs = beside_transformers(name, kind, **config)
    source = theirs.state_dict()
    if part == "file":
        theirs.save_pretrained(tmp_path)
        source = tmp_path / "model.safetensors"
    elif part == "backbone":
        source = theirs.base_model.state_dict()
        assert not any(key.startswith(("pvt_v2.", "segformer.", "classifier.")) for key in source)
    model = create_model(name, 10, depths=SHALLOW, eps="transformers", features_only=part == "backbone").double()
    report = load_checkpoint(model, source)
    assert report.source == "transformers" and report.complete and not report.notes and not report.left_out
    assert same(model, ours.state_dict()) and len(report.loaded) == len(model.state_dict())


def test_transformers_weights_in_a_model_with_the_official_epsilons():
    _, theirs = beside_transformers("pvt_v2_b0", "PvtV2ForImageClassification")
    model = create_model("pvt_v2_b0", 10, depths=SHALLOW)
    with pytest.warns(UserWarning, match="with eps='transformers' it returns what transformers returns"):
        report = load_checkpoint(model, theirs.state_dict())
    assert report.complete and len(report.notes) == 1 and "patch_embed=1e-05" in report.notes[0]


def test_names_that_nobody_uses_stay_visible():
    _, theirs = beside_transformers("pvt_v2_b0", "PvtV2ForImageClassification")
    model = create_model("pvt_v2_b0", 10, depths=SHALLOW, eps="transformers")
    strange = "pvt_v2.encoder.layers.0.blocks.0.attention.extra.weight"
    source = {**theirs.state_dict(), strange: torch.ones(1)}
    lonely = "pvt_v2.encoder.layers.0.blocks.0.attention.key.weight"
    del source[lonely.replace("key", "value")]
    report = load_checkpoint(model, source, strict=False)
    assert report.unexpected == ["block1.0.attn.k.weight", strange] and report.missing == ["block1.0.attn.kv.weight"]


def test_weights_of_the_linear_variant_do_not_fit_the_other():
    report = load_checkpoint(small(), small(name="pvt_v2_b2_li", mlp_ratios=(8, 8, 4, 4)).state_dict(), strict=False)
    assert "block1.0.attn.sr.weight" in report.mismatching and "block4.0.attn.sr.weight" in report.unexpected


@pytest.mark.parametrize("overrides", [{"features_only": True}, {"num_classes": 0}], ids=["features", "no classifier"])
def test_what_a_model_was_built_without_is_no_error(overrides):
    report = load_checkpoint(small(**overrides), small().state_dict())
    assert set(report.left_out) == {"head.weight", "head.bias"} and report.complete


@pytest.mark.parametrize(("h", "w"), [(29, 29), (30, 97), (64, 33)])
@pytest.mark.parametrize("name", ["pvt_v2_b0", "pvt_v2_b2_li"])
def test_images_of_any_size(name, h, w):
    ours, theirs = beside_timm(name, **SMALL)
    x = image(2, h, w, dtype=torch.float64)
    with torch.no_grad():
        assert relative_l2(ours(x), theirs(x)) <= 1e-13
        assert relative_l2(ours(x[:0]), theirs(x)[:0]) == 0 and ours(x[:0]).shape == (0, 10)


def test_the_linear_variant_takes_the_smallest_images():
    ours, theirs = beside_timm("pvt_v2_b2_li", **SMALL)
    x = image(1, 1, 3, dtype=torch.float64)
    with torch.no_grad():
        assert ours.min_size == 1 and relative_l2(ours(x), theirs(x)) <= 1e-13


def test_pooled_features():
    full, pooled = small().eval(), small(0).eval()
    pooled.load_state_dict({k: v for k, v in full.state_dict().items() if not k.startswith("head.")})
    x = image()
    with torch.no_grad():
        assert torch.equal(full.head(pooled(x)), full(x)) and torch.equal(pooled(x), full.forward_features(x))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "channels last"])
def test_memory_layouts_of_the_image(layout):
    model, x = small().double().eval(), image(dtype=torch.float64)
    with torch.no_grad():
        assert relative_l2(model(x.contiguous(memory_format=layout)), model(x.mT.contiguous().mT)) <= 1e-14


@pytest.mark.parametrize("name", ["pvt_v2_b0", "pvt_v2_b2_li"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_the_whole_model_in_half_precision(name, dtype):
    model, x = small(name=name).eval(), image()
    with torch.no_grad():
        expected = model(x)
        y = model.to(dtype)(x.to(dtype))
    assert y.dtype == dtype and relative_l2(y, expected) < 16 * torch.finfo(dtype).eps


def test_every_parameter_trains():
    for model in (small(), small(name="pvt_v2_b2_li"), small(features_only=True)):
        y = model.bfloat16()(image().bfloat16())
        sum(t.float().square().mean() for t in (y if isinstance(y, list) else [y])).backward()
        assert all(bool(p.grad.isfinite().all()) for p in model.parameters())


def test_dropouts_work_in_training_only():
    for rates in ({"drop_path_rate": 0.9}, {"drop_rate": 0.5}, {"attn_drop_rate": 0.5}):
        model, x = small(**rates), image()
        torch.manual_seed(0)
        with torch.no_grad():
            assert not torch.equal(model(x), model(x)), rates
            model.eval()
            assert torch.equal(model(x), model(x)), rates


def test_a_dropped_block_is_the_identity():
    model = small(drop_path_rate=1.0).train()
    assert isinstance(model.block4[0].drop_path, DropPath) and isinstance(model.block1[0].drop_path, nn.Identity)
    x = torch.randn(3, 6, 40)
    with torch.no_grad():
        assert torch.equal(model.block4[0](x, 2, 3), x)


@pytest.mark.parametrize("hooked", ["attn", "mlp"])
def test_a_hook_that_changes_its_output_is_obeyed(hooked):
    """It gets the branch without the residual, as if nothing were fused."""
    ours, theirs = beside_timm("pvt_v2_b0", **SMALL)
    for block in (ours.block2[0], theirs.stages[1].blocks[0]):
        block.get_submodule(hooked).register_forward_hook(lambda module, args, out: 2 * out)
    x = image(dtype=torch.float64)
    with torch.no_grad():
        assert relative_l2(ours(x), theirs(x)) <= 1e-13


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies(copier):
    model, x = small(name="pvt_v2_b2_li").eval(), image()
    accelerate(model, inference=True)
    with torch.no_grad():
        assert torch.equal(copier(model)(x), model(x))


def packings(model):
    """What the blocks keep packed; a call that needs anything else packs it."""
    kept = [m._packed for m in model.modules() if isinstance(m, (MixFFN, SpatialReductionAttention))]
    sites = [site for packed in kept for site in (packed.values() if isinstance(packed, dict) else [packed])]
    assert sum(site._entry is not None for site in sites) >= 3 * len(model.block1) + len(model.block4)
    return [site._entry for site in sites]


@pytest.mark.parametrize("name", ["pvt_v2_b0", "pvt_v2_b2_li", "mit_b0"])
def test_accelerate_releases_packs_and_is_undone(name):
    model, x = small(name=name, backend="reference").eval(), image()
    own = (DenseLinear, MixFFN, PatchEmbedding, SpatialReductionAttention)
    fused = [path for path, module in model.named_modules() if isinstance(module, own)]
    with torch.no_grad():
        expected = model(x)
        report = accelerate(model, inference=True)
        assert [row.path for row in report.replaced] == fused and len(fused) == 15 and not report.left_alone
        packed = packings(model)
        assert relative_l2(model(x), expected) <= 1e-5
        assert all(one is other for one, other in zip(packings(model), packed, strict=True))
        # The second of two equal calls was recorded, the third repeats it.
        assert torch.equal(model(x), model(x)) and model._repeater.recorded == 1
        assert restore(model)
        assert torch.equal(model(x), expected)
    assert {m.backend for m in model.modules() if hasattr(m, "backend")} == {"reference"}


def test_explain_names_the_operators():
    with torch.no_grad():
        lines = str(explain(small().eval(), image())).splitlines()
    counts = {n: sum(n in line for line in lines) for n in ("depthwise_mlp", "global_attention", "patch_embedding")}
    # Of the five blocks one is in stage 4, whose map is not reduced, but normalised for the keys.
    assert counts == {"depthwise_mlp": 5, "global_attention": 5, "patch_embedding": 4 + 4 + 1}


def test_backend_reaches_every_fused_module():
    assert {m.backend for m in small(backend="reference").modules() if hasattr(m, "backend")} == {"reference"}
    assert {m.backend for m in small().modules() if hasattr(m, "backend")} == {None}


def test_other_images():
    assert small(in_chans=5)(image(channels=5)).shape == (2, 10)
    assert small().no_weight_decay() == set()


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (image(channels=4), r"x: expected an image batch \[B, 3, H, W\], got shape \(2, 4, 64, 48\)"),
        (image(1, 28, 40), r"x: expected at least 29 x 29 pixels, got \(28, 40\)"),
    ],
)
def test_images_that_do_not_fit(x, message):
    with pytest.raises(ValueError, match=message):
        small()(x)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"depths": (1, 1)}, r"embed_dims: 4 stages, but the other arguments have \[2, 4, 4, 4\]"),
        ({"num_heads": (3, 2, 4, 5)}, "num_heads: 3 does not divide dim = 16"),
        (
            {"eps": "mine"},
            "eps: expected a NormEps or one of official, timm, transformers, tiny-transformers, got 'mine'",
        ),
    ],
)
def test_overrides_that_do_not_fit(overrides, message):
    with pytest.raises(ValueError, match=message):
        create_model("pvt_v2_b0", **{**SMALL, **overrides})


def test_conventions():
    assert small().eps == small(eps="timm").eps == NormEps(1e-6, 1e-6, 1e-5, 1e-5)
    assert small(eps="transformers").eps == small(eps="tiny-transformers").eps == NormEps(1e-6, 1e-6, 1e-6, 1e-6)
    assert small(name="mit_b0").eps == NormEps() and small(name="mit_b0", eps="transformers").eps.block == 1e-5
