"""CvT's structure, inputs and outputs."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from cvt_pairs import SMALL, image
from torch import nn

from fastvit_kernels.models import create_model, list_models, register
from fastvit_kernels.nn import ConvProjectionAttention, DropPath, PointwiseMLP
from fastvit_kernels.testing import relative_l2


def empty(name, *arguments, **overrides):
    """A model without memory for its weights."""
    with torch.device("meta"):
        return create_model(name, *arguments, **overrides)


@pytest.mark.parametrize(
    ("name", "entries", "parameters"),
    [("cvt_13", 459, 19_997_480), ("cvt_21", 731, 31_622_696), ("cvt_w24", 833, 277_196_392)],
)
def test_entries_and_parameters(name, entries, parameters):
    model = empty(name)
    assert len(model.state_dict()) == entries
    assert sum(p.numel() for p in model.parameters()) == parameters


def test_names_and_shapes_are_the_official_ones(small, small_plain):
    model = small()
    ours, plain = model.state_dict(), small_plain.state_dict()
    assert {name: value.shape for name, value in ours.items()} == {name: v.shape for name, v in plain.items()}
    model.load_state_dict(plain, strict=True)
    small_plain.load_state_dict(ours, strict=True)


@pytest.mark.parametrize(("h", "w"), [(64, 48), (70, 45), (33, 97), (3, 3)])
def test_equals_plain_pytorch(small, small_plain, h, w):
    ours, plain = small().double().eval(), small_plain.double().eval()
    ours.load_state_dict(plain.state_dict(), strict=True)
    x = image(2, h, w, dtype=torch.float64)
    with torch.no_grad():
        assert relative_l2(ours(x), plain(x)) <= 1e-13


def drop_path_rates(model):
    return [
        [block.drop_path.drop_prob if isinstance(block.drop_path, DropPath) else 0.0 for block in stage.blocks]
        for stage in (model.stage0, model.stage1, model.stage2)
    ]


@pytest.mark.parametrize(("name", "last"), [("cvt_13", 0.1), ("cvt_21", 0.1), ("cvt_w24", 0.3)])
def test_drop_path_grows_inside_the_last_stage_only(name, last):
    *first, stage = drop_path_rates(empty(name))
    assert not any(rate for rates in first for rate in rates)
    assert stage == pytest.approx([last * i / (len(stage) - 1) for i in range(len(stage))], abs=1e-7)
    assert drop_path_rates(empty(name, drop_path_rate=0.5))[2][-1] == 0.5


def test_initialisation():
    torch.manual_seed(0)
    model = create_model("cvt_13", **{**SMALL, "embed_dims": (16, 32, 192)})
    linears = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    values = torch.cat([linear.weight.detach().flatten() for linear in linears.values()])
    # Truncation at two, in units of 1 and not of the deviation, cuts nothing off.
    assert abs(float(values.std()) - 0.02) < 2e-4 and abs(float(values.mean())) < 1e-4
    assert all(not bool(m.bias.any()) for name, m in linears.items() if name != "head")
    assert abs(float(model.stage2.cls_token.detach().std()) - 0.02) < 5e-3
    for module in model.modules():
        if isinstance(module, (nn.LayerNorm, nn.BatchNorm2d)):
            assert bool((module.weight == 1).all()) and not bool(module.bias.any())
        if isinstance(module, nn.Conv2d):
            bound = module.weight[0].numel() ** -0.5
            assert 0.8 * bound < float(module.weight.detach().abs().max()) <= bound


def test_one_image_keeps_its_batch_axis(small):
    assert small()(image(1)).shape == (1, 10)


def test_an_empty_batch(small):
    assert small().eval()(image(0)).shape == (0, 10)


def test_without_classifier_the_class_token_comes_out(small):
    full, headless = small().eval(), small(0).eval()
    headless.load_state_dict(full.state_dict(), strict=False)
    x = image()
    with torch.no_grad():
        pooled = headless(x)
        assert pooled.shape == (2, 48) and torch.equal(pooled, full.forward_features(x))
        assert torch.equal(full.head(pooled), full(x))
    assert sorted(set(full.state_dict()) - set(headless.state_dict())) == ["head.bias", "head.weight"]


def test_feature_maps_of_every_stage(small):
    full, backbone = small().eval(), small(features_only=True).eval()
    backbone.load_state_dict({k: v for k, v in full.state_dict().items() if k.startswith("stage")}, strict=True)
    x = image(2, 70, 45)
    with torch.no_grad():
        maps = backbone(x)
        assert [tuple(m.shape) for m in maps] == [(2, 16, 17, 11), (2, 32, 9, 6), (2, 48, 5, 3)]
        expected, _ = full.stage0(x)
        assert torch.equal(maps[0], expected)
        assert torch.equal(maps[2], full.forward_maps(x)[2])
    assert all(m.is_contiguous(memory_format=torch.channels_last) for m in maps)
    assert [tuple(info) for info in backbone.feature_info] == [(16, 4), (32, 8), (48, 16)]
    assert not any(name.startswith(("norm.", "head.")) for name in backbone.state_dict())
    with pytest.raises(ValueError, match="features_only"):
        backbone.forward_features(x)


def test_feature_maps_train_every_parameter(small):
    backbone = small(features_only=True, drop_path_rate=0.0)
    sum(m.square().mean() for m in backbone(image())).backward()
    assert all(p.grad is not None for p in backbone.parameters())


def test_maps_between_stages_are_views_of_the_tokens(small):
    model = small().eval()
    tokens, inputs = [], []
    model.stage0.blocks[-1].register_forward_hook(lambda module, args, out: tokens.append(out))
    model.stage1.patch_embed.proj.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    with torch.no_grad():
        model(image())
    assert tokens[0].data_ptr() == inputs[0].data_ptr()
    assert inputs[0].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "channels last"])
def test_memory_layouts_of_the_image(small, layout):
    model = small().double().eval()
    x = image(dtype=torch.float64)
    with torch.no_grad():
        assert relative_l2(model(x.contiguous(memory_format=layout)), model(x)) <= 1e-14
        assert relative_l2(model(x.mT.contiguous().mT), model(x)) <= 1e-14


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_the_whole_model_in_half_precision(small, dtype):
    model = small().eval()
    x = image()
    with torch.no_grad():
        expected = model(x)
        y = model.to(dtype)(x.to(dtype))
    assert y.dtype == dtype
    assert relative_l2(y, expected) < 16 * torch.finfo(dtype).eps


def test_half_precision_trains(small):
    model = small(drop_path_rate=0.0).bfloat16().train()
    model(image().bfloat16()).float().square().sum().backward()
    assert all(bool(p.grad.isfinite().all()) for p in model.parameters())


def test_stochastic_depth_and_dropout_work_in_training_only(small):
    model = small(drop_path_rate=0.9, drop_rate=0.2, attn_drop_rate=0.2, depths=(1, 1, 2))
    x = image()
    torch.manual_seed(0)
    with torch.no_grad():
        assert not torch.equal(model(x), model(x))
        model.eval()
        assert torch.equal(model(x), model(x))


def test_a_dropped_block_is_the_identity(small):
    model = small(drop_path_rate=1.0, depths=(1, 1, 2)).train()
    tokens = torch.randn(3, 13, 48)
    with torch.no_grad():
        assert torch.equal(model.stage2.blocks[1](tokens, 3, 4), tokens)
        assert not torch.equal(model.stage2.blocks[0](tokens, 3, 4), tokens)


@pytest.mark.parametrize("hooked", ["attn", "mlp", "norm1", "norm2", "drop_path"])
def test_a_hook_inside_a_block_sees_the_official_values(small, small_plain, hooked):
    """A hook on a branch gets it without norm and residual, as if nothing were fused, and may change its output."""
    model, plain = small().double().eval(), small_plain.double().eval()
    model.load_state_dict(plain.state_dict(), strict=True)
    seen = []
    block = model.stage2.blocks[0]
    block.get_submodule(hooked).register_forward_hook(lambda m, args, out: seen.append((args[0], out)) or 2 * out)
    x = image(dtype=torch.float64)
    with torch.no_grad():
        y = model(x)
        theirs = plain.stage2.blocks[0]
        if hooked != "drop_path":
            theirs.get_submodule(hooked).register_forward_hook(
                lambda m, args, out: seen.append((args[0], out)) or 2 * out
            )
        else:
            theirs.attn.register_forward_hook(lambda m, args, out: seen.append((out, out)) or 2 * out)
            theirs.mlp.register_forward_hook(lambda m, args, out: seen.append((out, out)) or 2 * out)
        assert relative_l2(y, plain(x)) <= 1e-13
    half = len(seen) // 2
    assert half == (2 if hooked == "drop_path" else 1)
    for ours, wanted in zip(seen[:half], seen[half:], strict=True):
        for a, b in zip(ours, wanted, strict=True):
            assert relative_l2(a, b) <= 1e-13


def test_a_foreign_attention_in_a_block(small):
    class Mean(nn.Module):
        def forward(self, x, h, w):
            return x.mean(1, keepdim=True).expand_as(x)

    model = small().eval()
    model.stage1.blocks[0].attn = Mean()
    assert model(image()).shape == (2, 10)


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies(small, copier):
    model = small().eval()
    for module in model.modules():
        if hasattr(module, "prepare_inference"):
            module.prepare_inference(True)
    x = image()
    with torch.no_grad():
        assert torch.equal(copier(model)(x), model(x))


def test_torch_save(small):
    model, x = small().eval(), image()
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    with torch.no_grad():
        assert torch.equal(torch.load(file, weights_only=False)(x), model(x))


def test_backend_reaches_every_fused_module(small):
    backends = {
        m.backend
        for m in small(backend="reference").modules()
        if isinstance(m, (ConvProjectionAttention, PointwiseMLP))
    }
    assert backends == {"reference"}
    assert {m.backend for m in small().modules() if hasattr(m, "backend")} == {None}


def test_other_images_and_activations(small):
    assert small(in_chans=5)(image(channels=5)).shape == (2, 10)
    exact, quick = small(activation="gelu").eval(), small().eval()
    x = image()
    with torch.no_grad():
        assert exact.stage0.blocks[0].mlp.fusion_obstacles() == []
        assert 1e-4 < relative_l2(exact(x), quick(x)) < 1


@pytest.mark.parametrize("method", ["avg", "linear"])
def test_other_projections(small, method):
    model = small(method=method)
    assert not any("conv_proj" in name for name in model.state_dict())
    model(image()).sum().backward()
    assert model.stage0.blocks[0].attn.proj_k.weight.grad is not None


def test_no_weight_decay_names_the_class_token(small):
    model = small()
    assert model.no_weight_decay() == {"stage2.cls_token"} <= set(dict(model.named_parameters()))


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (image(channels=4), r"x: expected an image batch \[B, 3, H, W\], got shape \(2, 4, 64, 48\)"),
        (image()[0], r"x: expected an image batch \[B, 3, H, W\], got shape \(3, 64, 48\)"),
        (image(1, 2, 40), r"x: expected at least 3 x 3 pixels, got \(2, 40\)"),
    ],
)
def test_images_that_do_not_fit(small, x, message):
    with pytest.raises(ValueError, match=message):
        small()(x)


def test_the_smallest_image_of_another_geometry(small):
    model = small(padding_q=0, padding_kv=0, kernel_size=2, stride_q=1).eval()
    size = model.min_size
    with torch.no_grad():
        with pytest.raises(ValueError, match="pixels"):
            model(image(1, size - 1, size))
        # A stride of one without padding shrinks the queries' map, which the residual refuses; the filters still fit.
        with pytest.raises(ValueError, match="residual"):
            model(image(1, size, size))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"activation": "relu"}, "activation: expected one of quick_gelu, gelu, got 'relu'"),
        ({"depths": (1, 1)}, r"depths: 2 stages, but the other arguments have \[3, 3, 3, 3, 3\]"),
        ({"num_heads": (1, 5, 6)}, "num_heads: 5 does not divide dim_out = 192"),
        ({"method": "conv"}, "method: expected one of"),
    ],
)
def test_overrides_that_do_not_fit(overrides, message):
    with pytest.raises(ValueError, match=message):
        create_model("cvt_13", **overrides)


def test_unknown_overrides_and_names():
    with pytest.raises(TypeError, match="window_size"):
        create_model("cvt_13", window_size=7)
    with pytest.raises(ValueError, match="backend: unknown backend 'gpu', expected one of auto, "):
        create_model("cvt_13", backend="gpu")
    with pytest.raises(ValueError, match="name: unknown model 'cvt13'; did you mean cvt_13 or cvt_21 or"):
        create_model("cvt13")


def test_listing_and_registering():
    assert list_models("cvt*") == ["cvt_13", "cvt_21", "cvt_w24"] and {"cmt_s", "hat_net_small"} < set(list_models())
    assert list_models("cvt_?1*") == ["cvt_21"] and list_models("resnet*") == []
    with pytest.raises(ValueError, match="a model named 'cvt_13' exists already"):

        @register
        def cvt_13():
            pass
