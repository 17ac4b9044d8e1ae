"""PVTv2, MiT and SegFormer compute in fp64 what timm and transformers do, and a single mistake would show."""

from __future__ import annotations

import copy
import functools

import parity
import pytest
import torch
from cvt_pairs import image
from parity import TOLERANCE, Pair
from pyramid_pairs import SHALLOW, beside_timm, beside_transformers
from torch import nn

from fastvit_kernels import ops
from fastvit_kernels.models import create_model
from fastvit_kernels.models.pvt_v2 import NormEps
from fastvit_kernels.models.pvt_v2_keys import official_names
from fastvit_kernels.models.segformer import SegFormer
from fastvit_kernels.testing import relative_l2

# No multiples of 32, different each way: some rows and columns are left out of the reduced maps.
H, W = 37, 45
# At their full depth where that fits in a test; b3, b4 and b5 have more of the same blocks.
TIMM = {
    "pvt_v2_b0": None,
    "pvt_v2_b1": None,
    "pvt_v2_b2": None,
    "pvt_v2_b2_li": None,
    "pvt_v2_b3": SHALLOW,
    "pvt_v2_b4": SHALLOW,
    "pvt_v2_b5": SHALLOW,
}
MIT_B1 = {"hidden_sizes": [64, 128, 320, 512]}
TRANSFORMERS = {
    "pvt_v2": ("pvt_v2_b0", "PvtV2ForImageClassification", {}),
    "pvt_v2 linear": ("pvt_v2_b2_li", "PvtV2ForImageClassification", {**MIT_B1, "linear_attention": True}),
    "mit": ("mit_b1", "SegformerForImageClassification", MIT_B1),
    "segformer": ("segformer_b0", "SegformerForSemanticSegmentation", {}),
}


@functools.lru_cache(maxsize=1)
def timm_pair(name):
    """Put changes back: the next test gets the same pair."""
    return beside_timm(name, TIMM[name])


def logits(model, x):
    y = model(x)
    return y if isinstance(y, torch.Tensor) else y.logits


def named(model, values):
    """By our names."""
    if isinstance(model, SegFormer):
        return values
    if hasattr(model, "decode_head"):
        return create_model("segformer_b0").convert_checkpoint(values).state_dict
    return official_names(values)[1]


def run(model, x):
    """Logits, gradient of the input, gradients of the parameters by our names."""
    model.zero_grad()
    x = x.clone().requires_grad_()
    y = logits(model, x)
    (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    return y.detach(), x.grad, named(model, gradients)


def assert_same(pair, x):
    (y, gx, gradients), (their_y, their_gx, theirs) = run(pair.ours, x), run(pair.theirs, x)
    assert y.shape == their_y.shape
    assert relative_l2(y, their_y) <= TOLERANCE and relative_l2(gx, their_gx) <= TOLERANCE
    assert gradients.keys() == theirs.keys()
    # The gradients of the keys' biases vanish but for rounding.
    scale = max(float(g.norm()) for g in theirs.values())
    for name, gradient in gradients.items():
        error = float((gradient - theirs[name]).norm())
        assert error <= TOLERANCE * float(theirs[name].norm()) + 1e-15 * scale, name


@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
@pytest.mark.parametrize("name", TIMM, scope="module")
def test_timm(name, training):
    both = Pair(*(model.train(training) for model in timm_pair(name)))
    try:
        assert_same(both, image(2, H, W, dtype=torch.float64))
    finally:
        for model in both:
            model.eval()


@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
@pytest.mark.parametrize("kind", TRANSFORMERS)
def test_transformers(kind, training):
    name, theirs, config = TRANSFORMERS[kind]
    both = beside_transformers(name, theirs, **config)
    for model in both:
        model.train(training)
    assert_same(both, image(2, H, W, dtype=torch.float64))
    expected = named(both.theirs, both.theirs.state_dict())
    buffers = dict(both.ours.named_buffers())
    assert len(buffers) == (3 if kind == "segformer" else 0)
    for name, buffer in buffers.items():
        torch.testing.assert_close(buffer, expected[name], rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("kind", TRANSFORMERS)
def test_the_official_epsilons_are_not_those_of_transformers(kind):
    name, theirs, config = TRANSFORMERS[kind]
    with pytest.warns(UserWarning, match="other LayerNorm epsilons"):
        ours, theirs = beside_transformers(name, theirs, eps="official", **config)
    x = image(1, H, W, dtype=torch.float64)
    with torch.no_grad():
        assert relative_l2(ours(x), logits(theirs, x)) > 1e-8


def test_stochastic_depth_drops_what_timm_drops():
    """Rates grow through the blocks as timm's do; both halves of a block draw, attention first."""
    both = beside_timm("pvt_v2_b0", drop_path_rate=0.9)
    x = image(4, 33, 33, dtype=torch.float64)
    results = []
    for model in both:
        torch.manual_seed(3)
        with torch.no_grad():
            results.append(model.train()(x))
    assert relative_l2(*results) <= TOLERANCE
    with torch.no_grad():
        assert relative_l2(both.ours.eval()(x), results[0]) > 0.01


@pytest.mark.parametrize("side", [29, 32])
@pytest.mark.parametrize("name", ["pvt_v2_b0", "pvt_v2_b2_li"])
def test_feature_maps(name, side):
    options = {"depths": SHALLOW}
    ours, theirs = beside_timm(name, **options)
    backbone = create_model(name, features_only=True, **options).double().eval()
    backbone.load_state_dict({k: v for k, v in ours.state_dict().items() if not k.startswith("head.")})
    x = image(2, side, side + 5, dtype=torch.float64)
    with torch.no_grad():
        maps, (_, expected) = backbone(x), theirs.forward_intermediates(x)
    for found, wanted in zip(maps, expected, strict=True):
        assert relative_l2(found, wanted) <= TOLERANCE
        assert found.is_contiguous(memory_format=torch.channels_last)
    assert [tuple(info) for info in backbone.feature_info] == [
        (info["num_chs"], info["reduction"]) for info in theirs.feature_info
    ]


@pytest.mark.parametrize("name", ["pvt_v2_b0", "pvt_v2_b2_li"])
def test_fp32_logits(name):
    exact, x = timm_pair(name).ours, image(2, 64, 64)
    with torch.no_grad():
        assert relative_l2(copy.deepcopy(exact).float()(x), exact(x.double())) <= 1e-5


@pytest.mark.parametrize("name", ["pvt_v2_b0", "pvt_v2_b2_li"])
def test_bf16_logits_are_as_good_as_timms(name):
    exact, theirs = timm_pair(name)
    ours, plain = copy.deepcopy(exact).float(), copy.deepcopy(theirs).float()
    x = image(4, 64, 64)
    with torch.no_grad():
        expected = exact(x.double())
        with torch.autocast("cpu", torch.bfloat16):
            assert relative_l2(ours(x), expected) <= 2 * relative_l2(plain(x), expected)


def test_segformers_pixels_in_fp32_and_bf16():
    exact, theirs = beside_transformers(*TRANSFORMERS["segformer"][:2])
    ours, plain = copy.deepcopy(exact).float(), copy.deepcopy(theirs).float()
    x = image(2, 64, 64)
    with torch.no_grad():
        expected = exact(x.double())
        assert relative_l2(ours(x), expected) <= 1e-5
        with torch.autocast("cpu", torch.bfloat16):
            assert relative_l2(ours(x), expected) <= 2 * relative_l2(plain(x).logits, expected)


def tanh_gelu(model, patch):
    for module in model.modules():
        if isinstance(module, nn.GELU):
            patch.setattr(module, "approximate", "tanh")


def changed(operator, **arguments):
    """The operator with other arguments, each given as a function of its own value."""

    def mistake(model, patch):
        original = getattr(ops, operator)

        def wrong(*positional, **named):
            known = {name: change(named[name]) for name, change in arguments.items() if name in named}
            return original(*positional, **{**named, **known})

        patch.setattr(ops, operator, wrong)

    mistake.__name__ = f"{operator}: {', '.join(arguments)}"
    return mistake


def keys_and_values_exchanged(model, patch):
    original = ops.global_attention

    def wrong(q, kv, **named):
        return original(q, kv.roll(kv.shape[-1] // 2, -1), **named)

    patch.setattr(ops, "global_attention", wrong)


def no_norm_of_the_keys_pixels(model, patch):
    original = ops.patch_embedding

    def wrong(*arguments, in_norm_eps=None, in_norm_weight=None, in_norm_bias=None, **named):
        return original(*arguments, **named)

    patch.setattr(ops, "patch_embedding", wrong)


def eps_off_by_ten(name):
    def mistake(model, patch):
        norm = model.get_submodule(name)
        patch.setattr(norm, "eps", 10 * norm.eps)

    mistake.__name__ = f"eps of {name}"
    return mistake


def without(name):
    def mistake(model, patch):
        parent, _, child = name.rpartition(".")
        patch.setitem(model.get_submodule(parent)._modules, child, nn.Identity())

    mistake.__name__ = f"no {name}"
    return mistake


MISTAKES = [
    tanh_gelu,
    keys_and_values_exchanged,
    no_norm_of_the_keys_pixels,
    changed("global_attention", scale=lambda scale: scale**2),
    changed("global_attention", norm_eps=lambda eps: 1e-5),
    changed("depthwise_mlp", activation=lambda name: "quick_gelu"),
    changed("depthwise_mlp", hidden_activation=lambda name: "relu"),
    changed("depthwise_mlp", residual=lambda residual: None),
    *map(eps_off_by_ten, ("patch_embed2.norm", "block1.0.norm1", "block3.1.norm2", "block2.0.attn.norm", "norm3")),
    *map(without, ("norm2", "norm4")),
]
LINEAR_MISTAKES = [
    tanh_gelu,
    changed("depthwise_mlp", hidden_activation=lambda name: None),
    *map(eps_off_by_ten, ("block4.0.attn.norm", "block4.0.norm1")),
    *map(without, ("block2.0.attn.act", "block3.0.attn.pool")),
]


@pytest.mark.parametrize(
    ("name", "mistake"),
    [
        *(("pvt_v2_b0", mistake) for mistake in MISTAKES),
        *(("pvt_v2_b2_li", mistake) for mistake in LINEAR_MISTAKES),
    ],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_a_planted_mistake_breaks_parity(monkeypatch, name, mistake):
    def plant(model):
        mistake(model, monkeypatch)
        return monkeypatch.undo

    parity.assert_breaks(timm_pair(name), image(1, 45, 37, dtype=torch.float64), plant)


def test_each_epsilon_reaches_its_norms():
    eps = NormEps(block=1.0, stage=2.0, patch_embed=3.0, sr=4.0)
    model = create_model("mit_b0", eps=eps, depths=SHALLOW)
    found = {name: module.eps for name, module in model.named_modules() if isinstance(module, nn.LayerNorm)}
    expected = {"norm1": 1.0, "norm2": 1.0, "attn.norm": 4.0, "patch_embed": 3.0}
    for name, value in found.items():
        place = "patch_embed" if name.startswith("patch_embed") else name.split(".", 2)[-1]
        assert value == (2.0 if name in ("norm1", "norm2", "norm3", "norm4") else expected[place]), name
    assert len(found) == 22
