"""HierarchicalAttention against HAT-Net's attention in plain PyTorch."""

from __future__ import annotations

import copy
import io
import pickle

import plain_cvt
import plain_hat_net
import pytest
import torch
from torch import nn

from fastvit_kernels import accelerate, explain, restore
from fastvit_kernels.nn import HatMLP, HierarchicalAttention
from fastvit_kernels.ops import global_attention, local_attention
from fastvit_kernels.testing import assert_within_rule, relative_l2

DIM, HEAD = 24, 8
# Constructor arguments, then the map: published windows and pools, several windows, one, parts of one; one level.
CONFIGURATIONS = {
    "stage 1": ((8, 8), (16, 8)),
    "stage 2": ((7, 4), (28, 28)),
    "stage 3": ((7, 2), (14, 14)),
    "stage 4": ((1, 1), (7, 7)),
    "whole windows, cut squares": ((6, 4), (6, 12)),
    "cut windows": ((4, 2), (6, 9)),
    "smaller than a window": ((8, 8), (3, 5)),
    "smaller than a square": ((2, 8), (4, 4)),
    "one pixel": ((4, 2), (1, 1)),
    "one level, not square": ((1, 1), (5, 9)),
    "one level, one pixel": ((1, 1), (1, 1)),
    "one level, large": ((1, 1), (18, 18)),
}


def make(configuration="stage 3", dtype=torch.float64, **options):
    """Our module and the plain one with the same weights, and a map for both."""
    sizes, (h, w) = CONFIGURATIONS[configuration]
    plain = plain_cvt.randomize(plain_hat_net.Attention(DIM, HEAD, *sizes, **options)).to(dtype)
    ours = HierarchicalAttention(DIM, HEAD, *sizes, **options, pad="mask").to(dtype)
    ours.load_state_dict(plain.state_dict(), strict=True)
    return ours, plain, images(h, w, dtype=dtype)


def images(h, w, batch=2, dtype=torch.float64, seed=1):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, DIM, h, w, generator=generator, dtype=torch.float64) + 0.5
    return x.to(dtype, memory_format=torch.channels_last).requires_grad_()


def gradients(y, inputs, seed=2):
    generator = torch.Generator().manual_seed(seed)
    grad = torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y.dtype)
    return torch.autograd.grad(y, inputs, grad, allow_unused=True)


def statistics_of(x):
    mean = x.mean((1, 2, 3))
    return torch.stack([mean, (x - mean.view(-1, 1, 1, 1)).square().mean((1, 2, 3))], 1)


@pytest.mark.parametrize("configuration", CONFIGURATIONS)
def test_equals_the_original_with_all_gradients(configuration):
    ours, plain, x = make(configuration)
    assert ours.fusion_obstacles() == []
    y, expected = ours(x), plain(x)
    assert relative_l2(y, expected) <= 1e-14
    found = gradients(y, (x, *(p for p in ours.parameters() if p.requires_grad)))
    names = [name for name, _ in plain.named_parameters() if not name.startswith("proj_norm")]
    wanted = gradients(expected, (x, *(plain.get_parameter(name) for name in names)))
    for name, a, b in zip(("x", *names), found, wanted, strict=True):
        assert float((a - b).norm()) <= 1e-12 * max(float(b.norm()), 1.0), name


@pytest.mark.parametrize("configuration", ["stage 3", "cut windows", "stage 4", "one level, not square"])
def test_calling_the_submodules_gives_the_same(configuration):
    ours, plain, x = make(configuration)
    seen = []
    ours.qkv.register_forward_hook(lambda module, args, out: seen.append((args[0], out)))
    plain.qkv.register_forward_hook(lambda module, args, out: seen.append((args[0], out)))
    assert ours.fusion_obstacles() == ["qkv has hooks"]
    y, found = ours(x, residual=x, return_statistics=True)
    expected = x + plain(x)
    assert relative_l2(y, expected) <= 1e-14 and relative_l2(found, statistics_of(expected)) <= 1e-13
    (input_, output), (their_input, their_output) = seen
    assert relative_l2(input_, their_input) <= 1e-14 and relative_l2(output, their_output) <= 1e-14


@pytest.mark.parametrize("configuration", ["stage 1", "cut windows", "stage 4", "one level, not square"])
def test_residual_and_statistics(configuration):
    ours, plain, x = make(configuration)
    expected = x + plain(x)
    y, found = ours(x, residual=x, statistics=statistics_of(x), return_statistics=True)
    assert relative_l2(y, expected) <= 1e-14
    assert relative_l2(found, statistics_of(expected)) <= 1e-13
    parameters = (x, ours.norm.weight, ours.qkv.weight)
    theirs = (x, plain.norm.weight, plain.qkv.weight)
    for a, b in zip(gradients(y, parameters), gradients(expected, theirs), strict=True):
        assert relative_l2(a, b) <= 1e-12
    # They are used, not computed again: those of another map change the result.
    other = torch.tensor([[0.0, 4.0]], dtype=torch.float64).expand(2, -1)
    assert relative_l2(ours(x, residual=x, statistics=other), y) > 1e-2


def test_another_residual_than_the_input():
    ours, plain, x = make()
    residual = images(14, 14, seed=5).detach().contiguous()
    assert relative_l2(ours(x, residual=residual), residual + plain(x)) <= 1e-14


@pytest.mark.parametrize("configuration", ["stage 3", "cut windows", "stage 4", "one level, not square"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_the_cpu_kernels_keep_the_numerics_rule(configuration, dtype):
    ours, _, x = make(configuration, dtype=dtype)
    exact, low = copy.deepcopy(ours).double(), copy.deepcopy(ours)
    low.backend = "reference"
    with torch.no_grad():
        for prepared in (False, True):
            ours.prepare_inference(prepared)
            y = ours(x, residual=x)
            assert_within_rule(y, (exact(x.double(), residual=x.double()), low(x, residual=x)))


@pytest.mark.parametrize("configuration", ["stage 3", "cut windows", "stage 4", "one level, not square", "one pixel"])
def test_the_triton_kernels_keep_the_numerics_rule(configuration):
    """The whole module, forward and all gradients."""
    ours, _, x = make(configuration, dtype=torch.float32)
    exact = copy.deepcopy(ours).double()
    results = {}
    for name, module, image in (("triton", ours, x), ("reference", ours, x), ("exact", exact, x.detach().double())):
        module.backend = "reference" if name == "exact" else name
        image.requires_grad_()
        y = module(image, residual=image)
        trained = [p for n, p in module.named_parameters() if not n.startswith("proj_norm")]
        results[name] = [y.detach(), *gradients(y, [image, *trained])]
    for found, wanted, low in zip(results["triton"], results["exact"], results["reference"], strict=True):
        # Where a softmax has one key, gradients of its scores are rounding alone.
        scale = max(float(wanted.norm()), 1.0)
        assert float((found - wanted).norm()) <= max(2 * float((low - wanted).norm()), 1e-5 * scale)


@pytest.mark.parametrize("sizes", [(4, 6), (7, 2), (2, 3)])
def test_packing_needs_no_image(sizes):
    """Also where the squares are larger than the windows and no multiple of them."""
    stock = HierarchicalAttention(DIM, HEAD, *sizes).eval()
    ours, stock.backend = copy.deepcopy(stock), "reference"
    accelerate(ours, inference=True)
    x = torch.randn(1, DIM, 2 * sizes[0] * sizes[1], sizes[0] * sizes[1])
    with torch.no_grad():
        assert relative_l2(ours(x), stock(x)) <= 1e-5


@pytest.mark.parametrize("configuration", ["stage 3", "stage 4", "one level, not square"])
def test_autocast(configuration):
    ours, plain, x = make(configuration, dtype=torch.float32)
    exact = copy.deepcopy(plain).double()
    with torch.no_grad():
        expected = exact(x.double())
        with torch.autocast("cpu", torch.bfloat16):
            y, stock = ours(x), plain(x)
            ours.norm.register_forward_hook(lambda *_: None)
            composed = ours(x)
        assert y.dtype == composed.dtype == stock.dtype == torch.bfloat16
        assert relative_l2(y, expected) <= 2 * relative_l2(stock, expected)
        assert relative_l2(composed, expected) <= 2 * relative_l2(stock, expected)


@pytest.mark.parametrize(
    "layout", [lambda x: x.contiguous(), lambda x: x.mT.contiguous().mT, lambda x: x.expand(3, *x.shape[1:])[1:2]]
)
def test_memory_layouts(layout):
    ours, _, x = make()
    x = layout(x[:1].detach())
    out = ours(x, residual=x)
    assert relative_l2(out, ours(x.contiguous(memory_format=torch.channels_last), residual=x)) <= 1e-14
    assert out.is_contiguous(memory_format=torch.channels_last)


def test_state_dicts_load_strictly_both_ways():
    ours, plain, _ = make()
    assert list(ours.state_dict()) == list(plain.state_dict())
    assert {"proj_norm.weight", "proj_norm.bias"} < set(ours.state_dict())
    plain_cvt.randomize(ours, seed=5)
    plain.load_state_dict(ours.state_dict(), strict=True)
    for name, value in plain.state_dict().items():
        assert torch.equal(value, ours.state_dict()[name]), name


def test_the_unused_norm_is_no_part_of_the_graph():
    ours, _, x = make()
    before = ours(x)
    with torch.no_grad():
        ours.proj_norm.weight.fill_(float("nan"))
        ours.proj_norm.bias.fill_(float("nan"))
    y = ours(x)
    assert torch.equal(y, before)
    y.sum().backward()
    assert all((p.grad is None) == name.startswith("proj_norm.") for name, p in ours.named_parameters())
    assert [name for name, p in ours.named_parameters() if not p.requires_grad] == [
        "proj_norm.weight",
        "proj_norm.bias",
    ]


@pytest.mark.parametrize("drop", [0.0, 0.5])
def test_the_unused_norm_has_gradients_of_zero_when_it_is_made_trainable(drop):
    """Otherwise DistributedDataParallel would wait for them."""
    ours, _, x = make(drop=drop)
    expected = ours.eval()(x)
    ours.train().requires_grad_(True)
    with torch.no_grad():
        ours.proj_norm.weight.fill_(float("nan"))
    ours(x, residual=x).sum().backward()
    assert all(p.grad is not None for p in ours.parameters())
    assert not ours.proj_norm.weight.grad.any() and not ours.proj_norm.bias.grad.any()
    assert torch.equal(ours.eval()(x), expected)


def test_initialisation_is_that_of_the_layers():
    torch.manual_seed(3)
    ours = HierarchicalAttention(DIM, HEAD, 7, 2)
    torch.manual_seed(3)
    plain = plain_hat_net.Attention(DIM, HEAD, 7, 2)
    for name, value in plain.state_dict().items():
        assert torch.equal(value, ours.state_dict()[name]), name
    assert {m.eps for m in ours.modules() if isinstance(m, nn.GroupNorm)} == {1e-6}


def counted(monkeypatch, operator):
    """How often the operator's weights are packed."""
    packs = []
    packet = getattr(torch.ops.fastvit, f"{operator.__name__}_pack")
    original = packet.default
    monkeypatch.setattr(packet, "default", lambda *args: packs.append(1) or original(*args))
    return packs


@pytest.mark.parametrize(
    ("configuration", "operators"),
    [
        ("stage 3", (local_attention, global_attention)),
        ("stage 4", (local_attention,)),
        ("one level, large", (global_attention,)),
    ],
)
def test_weights_are_packed_once_and_again_when_they_change(configuration, operators, monkeypatch):
    ours, plain, x = make(configuration, dtype=torch.float32)
    ours.eval().prepare_inference(True)
    packs = [counted(monkeypatch, operator) for operator in operators]
    with torch.no_grad():
        for _ in range(3):
            assert relative_l2(ours(x), plain(x)) <= 1e-5
        assert [len(p) for p in packs] == [1] * len(packs)
        for change in (lambda w: w.mul_(-2), lambda w: setattr(w, "data", w.data + 0.1)):
            for module in (ours, plain):
                change(module.qkv.weight)
                change(module.proj.weight)
            assert relative_l2(ours(x), plain(x)) <= 1e-5
        assert [len(p) for p in packs] == [3] * len(packs)


@pytest.mark.parametrize("configuration", ["stage 2", "stage 4"])
def test_accelerate_packs_and_restore_forgets(configuration):
    ours, _, x = make(configuration, dtype=torch.float32)
    ours.eval()
    ours.backend = "reference"
    model = nn.Sequential(ours)
    expected = model(x)
    report = accelerate(model, inference=True)
    assert [row.path for row in report.replaced] == ["0"] and not report.left_alone and report.replaced[0].remarks == ()
    assert ours.backend is None
    used = (
        ("local_attention", "pooled_projection", "global_attention")
        if configuration == "stage 2"
        else ("local_attention",)
    )
    assert all(ours._packed[name].nbytes for name in used)
    with torch.no_grad():
        assert relative_l2(model(x), expected) <= 1e-5
    assert restore(model) and ours.backend == "reference" and ours._packed is None


def test_explain_names_both_operators():
    ours, _, x = make(dtype=torch.float32)
    with torch.no_grad():
        text = str(explain(ours, x))
    assert text.count("local_attention") == 1 and text.count("global_attention") == 1


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies_keep_everything_but_the_packed_weights(copier):
    ours, _, x = make(dtype=torch.float32)
    ours.eval().prepare_inference(True)
    with torch.no_grad():
        expected = ours(x)
        twin = copier(ours)
        assert all(weights.nbytes for weights in ours._packed.values())
        assert all(weights.nbytes == 0 for weights in twin._packed.values())
        assert torch.equal(twin(x), expected)


def test_torch_save():
    ours, _, x = make(dtype=torch.float32)
    file = io.BytesIO()
    torch.save(ours, file)
    file.seek(0)
    with torch.no_grad():
        assert torch.equal(torch.load(file, weights_only=False)(x), ours(x))


def test_dropout_drops_channels_before_the_residual():
    ours, _, x = make(drop=0.25)
    ours.train()
    assert ours.fusion_obstacles() == []
    with torch.no_grad():
        torch.manual_seed(0)
        residual = torch.full((40, DIM, 14, 14), 3.0, dtype=torch.float64)
        out, found = ours(x[:1].expand(40, -1, -1, -1), residual=residual, return_statistics=True)
        kept = (out != residual).flatten(2)
        assert torch.equal(kept.any(2), kept.all(2))
        assert abs(float(kept.any(2).double().mean()) - 0.75) < 0.05
        assert relative_l2(found, statistics_of(out)) <= 1e-13
        ours.eval()
        assert bool((ours(x, residual=residual[:2]) != residual[:2]).all())


@pytest.mark.parametrize(
    ("name", "replacement", "obstacle"),
    [
        ("norm", nn.GroupNorm(2, DIM), "norm has 2 groups, expected 1"),
        ("ds_norm", nn.GroupNorm(1, DIM, affine=False), "ds_norm has no weight or no bias"),
        ("grid_norm", nn.BatchNorm2d(DIM), "grid_norm is a BatchNorm2d, expected GroupNorm"),
        ("qkv", nn.Conv2d(DIM, 3 * DIM, 3, padding=1), "qkv does more than mix the channels of a pixel"),
        ("kv", nn.Conv2d(DIM, 2 * DIM, 1, groups=2), "kv does more than mix the channels of a pixel"),
        ("proj", nn.Sequential(nn.Conv2d(DIM, DIM, 1)), "proj is a Sequential, expected Conv2d"),
        ("avg_pool", nn.MaxPool2d(2), "avg_pool is a MaxPool2d, expected AvgPool2d"),
        ("avg_pool", nn.AvgPool2d(2, 1), "avg_pool has kernel_size=2 and stride=1, expected one number for both"),
        ("avg_pool", nn.AvgPool2d(2, ceil_mode=True), "avg_pool does not return averages of pixels alone"),
        ("avg_pool", nn.AvgPool2d(2, 2, 1), "avg_pool does not return averages of pixels alone"),
        ("avg_pool", nn.AvgPool2d(2, divisor_override=3), "avg_pool does not return averages of pixels alone"),
    ],
)
def test_a_foreign_submodule_is_called(name, replacement, obstacle):
    ours, plain, x = make()
    for module in (ours, plain):
        setattr(module, name, copy.deepcopy(replacement).double().eval())
    assert ours.fusion_obstacles() == [obstacle]
    assert relative_l2(ours(x), plain(x)) <= 1e-14


def test_a_hooked_pooling_sees_the_normalised_map():
    ours, plain, x = make()
    seen = []
    for module in (ours, plain):
        module.avg_pool.register_forward_hook(lambda module, args, out: seen.append(args[0]))
    assert ours.fusion_obstacles() == ["avg_pool has hooks"]
    assert relative_l2(ours(x), plain(x)) <= 1e-14
    assert relative_l2(*seen) <= 1e-14


@pytest.mark.parametrize("configuration", ["stage 3", "stage 4", "one level, not square"])
def test_an_empty_batch(configuration):
    ours, _, x = make(configuration, dtype=torch.float32)
    out, found = ours(x[:0], residual=x[:0], return_statistics=True)
    assert out.shape == x[:0].shape and found.shape == (0, 2)


def test_without_padding_the_official_sizes_and_the_official_pooling():
    _, plain, _ = make()
    ours = HierarchicalAttention(DIM, HEAD, 7, 2).double()
    ours.load_state_dict(plain.state_dict())
    plain.avg_pool.ceil_mode = False
    x = images(7, 21)
    assert ours(x).shape == x.shape and relative_l2(ours(x), plain(x)) <= 1e-14
    with pytest.raises(ValueError, match="x: expected sides that are multiples of grid_size = 7, got 7 x 20"):
        ours(images(7, 20))
    ours = HierarchicalAttention(DIM, HEAD, 2, 4).double()
    with pytest.raises(ValueError, match="x: expected sides of at least ds_ratio = 4, got 2 x 8"):
        ours(images(2, 8))


@pytest.mark.parametrize("shape", [(2, 14, 14, DIM), (DIM, 14, 14), (2, 196, DIM)])
def test_maps_of_another_shape(shape):
    with pytest.raises(ValueError, match=r"x: expected a map \[B, 24, H, W\], got shape"):
        make()[0](torch.zeros(shape, dtype=torch.float64))


def test_constructor_errors():
    with pytest.raises(ValueError, match="head_dim: 7 does not divide dim = 24"):
        HierarchicalAttention(24, 7)
    with pytest.raises(ValueError, match="grid_size: expected an integer of at least 1, got 0"):
        HierarchicalAttention(24, 8, 0)
    with pytest.raises(TypeError, match="ds_ratio: expected an integer, got tuple"):
        HierarchicalAttention(24, 8, 7, (2, 2))
    with pytest.raises(ValueError, match="pad: expected one of none, mask, got 'zero'"):
        HierarchicalAttention(24, 8, pad="zero")


@pytest.mark.parametrize("make_module", [lambda: HierarchicalAttention(24, 8, 7, 2), lambda: HatMLP(24, 48)])
@pytest.mark.parametrize("shape", [(2, 24, 7, 28), (2, 24, 196), (1, 24, 14, 14)])
def test_a_residual_of_another_shape_is_refused(make_module, shape):
    with pytest.raises(ValueError, match=r"residual: expected shape \(2, 24, 14, 14\), got"):
        make_module()(torch.zeros(2, 24, 14, 14), residual=torch.zeros(shape))
