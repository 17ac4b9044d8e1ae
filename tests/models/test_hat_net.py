"""HAT-Net's structure, inputs and outputs, and how statistics travel from block to block."""

from __future__ import annotations

import copy
import io
import pickle

import plain_cvt
import pytest
import torch
import torch.distributed as dist
from cvt_pairs import image
from hat_net_pairs import SMALL, small, small_plain
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from fastvit_kernels import accelerate, explain, restore
from fastvit_kernels.models import create_model, hat_net, list_models, load_checkpoint
from fastvit_kernels.nn import DenseConv2d, DropPath, HatMLP, HierarchicalAttention
from fastvit_kernels.ops import library
from fastvit_kernels.testing import relative_l2


def both():
    ours, plain = small().double().eval(), small_plain().double().eval()
    ours.load_state_dict(plain.state_dict(), strict=True)
    return ours, plain


def test_names():
    assert list_models("hat_net*") == ["hat_net_large", "hat_net_medium", "hat_net_small", "hat_net_tiny"]


def test_state_dicts_load_strictly_both_ways():
    model, plain = small(), small_plain()
    assert list(model.state_dict()) == list(plain.state_dict())
    plain_cvt.randomize(model, seed=3)
    plain.load_state_dict(model.state_dict(), strict=True)
    for name, value in plain.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name


def test_an_official_checkpoint_passes_through():
    model, official = small(), plain_cvt.randomize(small_plain(), seed=4).state_dict()
    report = load_checkpoint(model, {"model": {f"module.{name}": value for name, value in official.items()}})
    assert report.complete and report.source == "official" and len(report.loaded) == len(official)
    assert all(torch.equal(value, official[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("overrides", [{"features_only": True}, {"num_classes": 0}], ids=["features", "no classifier"])
def test_what_a_model_was_built_without_is_no_error(overrides):
    report = load_checkpoint(small(**overrides), small_plain().state_dict())
    assert set(report.left_out) == {"classifier.1.weight", "classifier.1.bias"} and report.complete


@pytest.mark.parametrize(("h", "w"), [(64, 48), (70, 45), (33, 97), (3, 3), (1, 1)])
def test_equals_plain_pytorch(h, w):
    ours, plain = both()
    x = image(2, h, w, dtype=torch.float64)
    with torch.no_grad():
        assert relative_l2(ours(x), plain(x)) <= 1e-13


def test_sizes_that_the_official_code_refuses_are_refused_on_request():
    model = small(pad="none", features_only=True).eval()
    with torch.no_grad():
        expected = small(features_only=True).eval()(image(1, 224, 224))
        for found, wanted in zip(model(image(1, 224, 224)), expected, strict=True):
            assert torch.equal(found, wanted)
        with pytest.raises(ValueError, match="grid_size = 7, got 24 x 28"):
            model(image(1, 192, 224))


def test_stochastic_depth_grows_through_all_blocks():
    model = create_model("hat_net_tiny", drop_path_rate=0.12, **{**SMALL, "depths": (2, 2, 6, 3)})
    rates = [m.drop_path.drop_prob if isinstance(m.drop_path, DropPath) else 0.0 for s in model.blocks for m in s]
    assert rates == pytest.approx([0.01 * i for i in range(13)], abs=1e-7)
    assert not any(isinstance(m, DropPath) for m in small().modules())


def test_initialisation():
    torch.manual_seed(0)
    model = create_model("hat_net_small", **{**SMALL, "dims": (64, 96, 128, 160)})
    convs = [m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    values = torch.cat([conv.weight.detach().flatten() for conv in convs])
    # Truncation at two, in units of 1 and not of the deviation, cuts nothing off.
    assert abs(float(values.std()) - 0.02) < 2e-4 and abs(float(values.mean())) < 1e-4
    assert all(not bool(m.bias.any()) for m in convs if m.bias is not None)
    norms = [m for m in model.modules() if isinstance(m, nn.GroupNorm)]
    assert all(bool((m.weight == 1).all()) and not bool(m.bias.any()) for m in norms)
    assert {(m.num_groups, m.eps) for m in norms} == {(1, 1e-6)}


@pytest.mark.parametrize("batch", [0, 1, 3])
def test_batches(batch):
    assert small().eval()(image(batch)).shape == (batch, 10)


def test_without_classifier_the_mean_of_the_last_map_comes_out():
    full, headless = small().eval(), small(0).eval()
    headless.load_state_dict(full.state_dict(), strict=False)
    x = image()
    with torch.no_grad():
        pooled = headless(x)
        assert pooled.shape == (2, 40) and torch.equal(pooled, full.forward_features(x))
        assert torch.equal(full.classifier(pooled), full(x))


def test_feature_maps_of_every_stage():
    full, plain = both()
    backbone = small(features_only=True).double().eval()
    backbone.load_state_dict({k: v for k, v in full.state_dict().items() if not k.startswith("classifier")})
    x = image(2, 70, 45, dtype=torch.float64)
    with torch.no_grad():
        maps, expected = backbone(x), plain.stages(x)
    assert [tuple(m.shape) for m in maps] == [(2, 16, 18, 12), (2, 24, 9, 6), (2, 32, 5, 3), (2, 40, 3, 2)]
    for found, wanted in zip(maps, expected, strict=True):
        assert relative_l2(found, wanted) <= 1e-13
        assert found.is_contiguous(memory_format=torch.channels_last)
    assert [tuple(info) for info in backbone.feature_info] == [(16, 4), (24, 8), (32, 16), (40, 32)]


def test_feature_maps_train_every_parameter():
    backbone = small(features_only=True)
    sum(m.square().mean() for m in backbone(image())).backward()
    assert all(p.grad is not None for p in backbone.parameters() if p.requires_grad)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "channels last"])
def test_memory_layouts_of_the_image(layout):
    model = small().double().eval()
    x = image(dtype=torch.float64)
    with torch.no_grad():
        assert relative_l2(model(x.contiguous(memory_format=layout)), model(x)) <= 1e-14
        assert relative_l2(model(x.mT.contiguous().mT), model(x)) <= 1e-14


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_the_whole_model_in_half_precision(dtype):
    model = small().eval()
    x = image()
    with torch.no_grad():
        expected = model(x)
        y = model.to(dtype)(x.to(dtype))
    assert y.dtype == dtype
    assert relative_l2(y, expected) < 16 * torch.finfo(dtype).eps


def test_half_precision_trains():
    model = small().bfloat16().train()
    model(image().bfloat16()).float().square().sum().backward()
    assert all(bool(p.grad.isfinite().all()) for p in model.parameters() if p.requires_grad)


def test_stochastic_depth_and_dropout_work_in_training_only():
    for rates in ({"drop_path_rate": 0.9}, {"drop_rate": 0.5}, {"classifier_drop_rate": 0.5}):
        model = small(**{"classifier_drop_rate": 0.0, **rates})
        x = image()
        torch.manual_seed(0)
        with torch.no_grad():
            assert not torch.equal(model(x), model(x))
            model.eval()
            assert torch.equal(model(x), model(x))


def test_a_dropped_block_is_the_identity():
    model = small(drop_path_rate=1.0).train()
    x = torch.randn(3, 40, 2, 3)
    with torch.no_grad():
        assert torch.equal(model.blocks[3][0](x), x)
        assert not torch.equal(model.blocks[0][0](torch.ones(1, 16, 8, 8)), torch.ones(1, 16, 8, 8))


@pytest.fixture
def statistics_given(monkeypatch):
    """For every fused call that takes statistics: which operator, and whether it got some."""
    calls = []
    original = library.call

    def call(operator, tensors, static, **options):
        position = {"local_attention": 5, "depthwise_mlp": 3}.get(operator.name)
        if position is not None:
            calls.append((operator.name, tensors[position] is not None))
        return original(operator, tensors, static, **options)

    monkeypatch.setattr(library, "call", call)
    return calls


LOCAL, MLP = "local_attention", "depthwise_mlp"


def second_stage(model):
    """A stage of two blocks alone."""
    return hat_net._run(model.blocks[1], torch.randn(2, 24, 6, 4))


def test_statistics_travel_from_block_to_block(statistics_given):
    with torch.no_grad():
        second_stage(small().eval())
    assert statistics_given == [(LOCAL, False), (MLP, True), (LOCAL, True), (MLP, True)]


def drop_path(model):
    model.blocks[1][0].drop_path = DropPath(0.5)


def hook_on_the_block(model):
    model.blocks[1][0].register_forward_hook(lambda module, args, out: None)


def hook_on_the_attention(model):
    model.blocks[1][1].attn.register_forward_hook(lambda module, args, out: None)


def hook_on_the_mlp(model):
    model.blocks[1][0].conv.register_forward_hook(lambda module, args, out: None)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        # Sums made outside the operators have unknown statistics.
        (drop_path, [(LOCAL, False), (MLP, False), (LOCAL, False), (MLP, True)]),
        (hook_on_the_block, [(LOCAL, False), (MLP, True), (LOCAL, False), (MLP, True)]),
        (hook_on_the_attention, [(LOCAL, False), (MLP, True), (LOCAL, False), (MLP, False)]),
        (hook_on_the_mlp, [(LOCAL, False), (MLP, False), (LOCAL, False), (MLP, True)]),
    ],
)
def test_statistics_are_found_anew_where_somebody_could_tell(statistics_given, change, expected):
    model = small().train()
    change(model)
    with torch.no_grad():
        second_stage(model)
    assert statistics_given == expected


@pytest.mark.parametrize("hooked", ["", "attn", "conv", "drop_path"])
def test_a_hook_that_changes_its_output_is_obeyed(hooked):
    """A hook on a branch gets it without the residual, as if nothing were fused, and may change its output."""
    ours, plain = both()
    seen = []

    def double(module, args, out):
        seen.append((args[0], out))
        return 2 * out

    ours.blocks[1][0].get_submodule(hooked).register_forward_hook(double)
    for name in ("attn", "conv") if hooked == "drop_path" else (hooked,):
        plain.blocks[1][0].get_submodule(name).register_forward_hook(double)
    x = image(dtype=torch.float64)
    with torch.no_grad():
        assert relative_l2(ours(x), plain(x)) <= 1e-13
    half = len(seen) // 2
    assert half == (2 if hooked == "drop_path" else 1)
    for (_, out), (_, wanted) in zip(seen[:half], seen[half:], strict=True):
        assert relative_l2(out, wanted) <= 1e-13


def test_a_foreign_attention_in_a_block():
    model, plain = both()
    for m in (model, plain):
        m.blocks[1][0].attn = nn.Sequential(nn.AvgPool2d(3, 1, 1))
    x = image(dtype=torch.float64)
    with torch.no_grad():
        assert relative_l2(model(x), plain(x)) <= 1e-13


@pytest.fixture
def one_process():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_ddp_need_not_look_for_unused_parameters(one_process):
    """Two steps, for the second is where a parameter without a gradient in the first is complained about."""

    def train(model):
        wrapped = DistributedDataParallel(model)
        for seed in (1, 2):
            wrapped(image(seed=seed)).sum().backward()

    train(small())
    train(small().requires_grad_(True))
    # As the official module has it: the complaint is what this test would see.
    with pytest.raises(RuntimeError, match="find_unused_parameters"):
        train(small_plain())


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies(copier):
    model, x = small().eval(), image()
    accelerate(model, inference=True)
    with torch.no_grad():
        assert torch.equal(copier(model)(x), model(x))


def test_torch_save():
    model, x = small().eval(), image()
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    with torch.no_grad():
        assert torch.equal(torch.load(file, weights_only=False)(x), model(x))


def test_accelerate_releases_packs_and_is_undone():
    model, x = small(backend="reference").eval(), image()
    fused = [name for name, m in model.named_modules() if isinstance(m, (DenseConv2d, HatMLP, HierarchicalAttention))]
    with torch.no_grad():
        expected = model(x)
        report = accelerate(model, inference=True)
        assert [row.path for row in report.replaced] == fused and len(fused) == 14 and not report.left_alone
        assert relative_l2(model(x), expected) <= 1e-5
        assert restore(model)
        assert torch.equal(model(x), expected)
    assert {m.backend for m in model.modules() if hasattr(m, "backend")} == {"reference"}


def test_explain_names_the_operators():
    with torch.no_grad():
        text = str(explain(small().eval(), image()))
    # Stage 4, one block, has a map of 2 x 2 pixels: one window, one level.
    counts = {name: sum(name in line for line in text.splitlines()) for name in (LOCAL, "global_attention", MLP)}
    assert counts == {LOCAL: 5, "global_attention": 4, MLP: 5}


def test_backend_reaches_every_fused_module():
    assert {m.backend for m in small(backend="reference").modules() if hasattr(m, "backend")} == {"reference"}
    assert {m.backend for m in small().modules() if hasattr(m, "backend")} == {None}


def test_other_images_and_activations():
    assert small(in_chans=5)(image(channels=5)).shape == (2, 10)
    relu, silu = small(act_layer=nn.ReLU).eval(), small().eval()
    x = image()
    with torch.no_grad():
        assert relu.blocks[0][0].conv.fusion_obstacles() == []
        assert relative_l2(relu(x), silu(x)) > 1e-4


def test_no_parameter_is_kept_from_weight_decay_by_name():
    assert small().no_weight_decay() == set()


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (image(channels=4), r"x: expected an image batch \[B, 3, H, W\], got shape \(2, 4, 64, 48\)"),
        (image()[0], r"x: expected an image batch \[B, 3, H, W\], got shape \(3, 64, 48\)"),
        (image(1, 0, 40), r"x: expected at least 1 x 1 pixels, got \(0, 40\)"),
    ],
)
def test_images_that_do_not_fit(x, message):
    with pytest.raises(ValueError, match=message):
        small()(x)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"depths": (1, 1)}, r"dims: 4 stages, but the other arguments have \[2, 4, 4, 4, 4\]"),
        ({"head_dim": 5}, "head_dim: 5 does not divide dim = 16"),
        ({"pad": "zero"}, "pad: expected one of none, mask, got 'zero'"),
    ],
)
def test_overrides_that_do_not_fit(overrides, message):
    with pytest.raises(ValueError, match=message):
        create_model("hat_net_small", **{**SMALL, **overrides})
