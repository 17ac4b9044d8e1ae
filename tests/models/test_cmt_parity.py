"""All four CMTs compute in fp64 what their equations in plain PyTorch do, and a single mistake would show."""

from __future__ import annotations

import copy
import functools

import parity
import pytest
import torch
from cvt_pairs import image
from torch import nn

from fastvit_kernels import ops
from fastvit_kernels.bench import plain_cmt
from fastvit_kernels.models import create_model
from fastvit_kernels.nn import IRFFN
from fastvit_kernels.testing import relative_l2

VARIANTS = tuple(plain_cmt.VARIANTS)
SIDE = 64


@functools.lru_cache(maxsize=1)
def pair(name, side=SIDE):
    """Put changes back: the next test gets the same pair."""
    sizes = {**plain_cmt.VARIANTS[name], "side": side}
    return parity.pair(name, plain_cmt.CMT(**sizes, num_classes=10), img_size=side, dp=0.0)


@pytest.mark.parametrize(
    ("name", "entries", "parameters", "tables"),
    [
        ("cmt_ti", 708, 9_492_426, 75_000),
        ("cmt_xs", 911, 15_247_208, 155_520),
        ("cmt_s", 1079, 26_256_160, 288_120),
        ("cmt_b", 1366, 45_715_076, 491_520),
    ],
)
def test_entries_and_parameters(name, entries, parameters, tables):
    with torch.device("meta"):
        model, plain = create_model(name), plain_cmt.CMT(**plain_cmt.VARIANTS[name])
    state = model.state_dict()
    assert len(state) == entries and sum(p.numel() for p in model.parameters()) == parameters
    assert sum(t.numel() for key, t in state.items() if key.startswith("relative_pos_")) == tables
    shapes = {key: value.shape for key, value in plain.state_dict().items()}
    assert {key: value.shape for key, value in state.items()} == shapes


def test_the_smallest_model_at_the_usual_size():
    with torch.device("meta"):
        assert sum(p.numel() for p in create_model("cmt_ti", img_size=224).parameters()) == 9_705_546


@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "batch statistics"])
@pytest.mark.parametrize("name", VARIANTS, scope="module")
def test_logits_and_gradients(name, training):
    both = copy.deepcopy(pair(name))
    for model in both:
        model.train(training)
    parity.assert_same(both, image(2, SIDE, SIDE, dtype=torch.float64))


def test_the_published_size():
    ours, theirs = pair("cmt_ti", 160)
    x = image(1, 160, 160, dtype=torch.float64)
    with torch.no_grad():
        assert relative_l2(ours(x), theirs(x)) <= parity.TOLERANCE


def test_fp32_logits():
    exact, _ = pair("cmt_s")
    x = image(2, SIDE, SIDE)
    with torch.no_grad():
        assert relative_l2(copy.deepcopy(exact).float()(x), exact(x.double())) <= 1e-5


def test_bf16_logits_are_as_good_as_the_plain_models():
    exact, theirs = pair("cmt_s")
    ours, plain = copy.deepcopy(exact).float(), copy.deepcopy(theirs).float()
    x = image(4, SIDE, SIDE)
    with torch.no_grad():
        expected = exact(x.double())
        with torch.autocast("cpu", torch.bfloat16):
            assert relative_l2(ours(x), expected) <= 2 * relative_l2(plain(x), expected)


def feed_forward(fold):
    """IRFFN's mathematics from its submodules; with `fold` the first batch norm is folded through the padding."""

    def forward(self, x, h, w, *, norm=None, residual=None):
        t = self.conv1((x if norm is None else norm(x)).mT.unflatten(2, (h, w)))
        filtered = self.proj(t)
        if fold:
            bn, ones = self.conv1[2], torch.ones_like(t[:1])
            shift = (bn.bias - bn.running_mean * bn.weight / (bn.running_var + bn.eps).sqrt())[:, None, None]
            # What the batch norm adds would lie on the border as well.
            inside = nn.functional.conv2d(ones, self.proj.weight, padding=1, groups=t.shape[1])
            filtered = filtered + shift * (self.proj.weight.sum((1, 2, 3))[:, None, None] - inside)
        t = self.proj_bn(self.proj_act(filtered + t))
        out = self.conv2(t).flatten(2).mT
        return out if residual is None else residual + out

    return forward


def test_the_folding_mistake_is_one_for_its_folding_alone(monkeypatch):
    ours, theirs = pair("cmt_ti")
    x = image(1, SIDE, SIDE, dtype=torch.float64)
    monkeypatch.setattr(IRFFN, "forward", feed_forward(fold=False))
    with torch.no_grad():
        assert relative_l2(ours(x), theirs(x)) <= parity.TOLERANCE


def first_batch_norm_folded_through_the_padding(model, patch):
    patch.setattr(IRFFN, "forward", feed_forward(fold=True))


def shortcut_behind_the_activation(model, patch):
    depthwise_mlp = ops.depthwise_mlp

    def wrong(*arguments, **named):
        assert named["inner_residual"] == "before_activation"
        return depthwise_mlp(*arguments, **{**named, "inner_residual": "after_activation"})

    patch.setattr(ops, "depthwise_mlp", wrong)


def no_shortcut(model, patch):
    depthwise_mlp = ops.depthwise_mlp
    patch.setattr(ops, "depthwise_mlp", lambda *a, **named: depthwise_mlp(*a, **{**named, "inner_residual": None}))


def batch_norms_in_front_of_the_activations(model, patch):
    depthwise_mlp = ops.depthwise_mlp
    patch.setattr(
        ops, "depthwise_mlp", lambda *a, **named: depthwise_mlp(*a, **{**named, "bn_after_activation": False})
    )


def tanh_gelu(model, patch):
    for module in model.modules():
        if isinstance(module, nn.GELU):
            patch.setattr(module, "approximate", "tanh")


def no_table(model, patch):
    global_attention = ops.global_attention
    patch.setattr(ops, "global_attention", lambda *a, **named: global_attention(*a, **{**named, "attn_bias": None}))


def eps_off_by_ten(name):
    def mistake(model, patch):
        norm = model.get_submodule(name)
        patch.setattr(norm, "eps", 10 * norm.eps)

    mistake.__name__ = f"eps of {name}"
    return mistake


MISTAKES = [
    first_batch_norm_folded_through_the_padding,
    shortcut_behind_the_activation,
    no_shortcut,
    batch_norms_in_front_of_the_activations,
    tanh_gelu,
    no_table,
    *(
        eps_off_by_ten(name)
        for name in (
            "stem_norm2",
            "patch_embed_b.norm",
            "blocks_a.1.norm1",
            "blocks_c.4.norm2",
            "blocks_b.0.attn.sr.1",
            "blocks_c.9.mlp.conv1.2",
            "blocks_c.9.mlp.proj_bn",
            "blocks_d.1.mlp.conv2.1",
            "_bn",
        )
    ),
]


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.__name__)
def test_a_planted_mistake_breaks_parity(monkeypatch, mistake):
    def plant(model):
        mistake(model, monkeypatch)
        return monkeypatch.undo

    parity.assert_breaks(pair("cmt_ti"), image(1, SIDE, SIDE, dtype=torch.float64), plant)
