"""timm's Twins on fused operators: the same numbers in every mode, timm's own code where that is impossible."""

from __future__ import annotations

import importlib

import pytest
import torch
from host_parity import (
    TOLERANCE,
    accelerated,
    assert_autocast_errs_no_more,
    assert_drops_the_same,
    assert_embeddings_fuse,
    assert_repeats,
    assert_reversible,
    assert_same,
    assert_same_step,
    blocks,
    calls_in,
    image,
    logits,
    operator_calls,
    planted,
    randomize,
)
from timm_host import load_timm
from torch import nn

import fastvit_kernels
from fastvit_kernels import ops
from fastvit_kernels.testing import relative_l2

load_timm()
twins = importlib.import_module("timm.models.twins")

LOCAL = ["local_attention", "pointwise_mlp"]
REDUCED = ["patch_embedding", "global_attention", "pointwise_mlp"]


def make(**options):
    """Local blocks of windows of 3 and 5 pixels in two stages, each in front of one with reduced keys."""
    small = {"img_size": 32, "num_classes": 7, "embed_dims": (16, 32), "num_heads": (1, 2), "mlp_ratios": (2, 2)}
    small |= {"depths": (2, 2), "sr_ratios": (2, 1), "wss": (3, 5)}
    torch.manual_seed(0)
    return randomize(twins.Twins(**{**small, **options}))


@pytest.mark.parametrize("inference", [False, True], ids=["plain", "packed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_same_numbers(dtype, inference):
    stock = make().to(dtype)
    fused, report = accelerated(stock, inference)
    assert len(blocks(report)) == 4 and not report.left_alone
    # Windows of 3 fill the first map of 24 x 36 pixels, none of the others is made of whole windows.
    assert_same(stock, fused, image(2, 3, 32, 32, dtype=dtype), image(1, 3, 48, 72, dtype=dtype))
    assert_same(stock, fused, image(1, 3, 44, 28, dtype=dtype))


def test_every_block_runs_its_operators():
    fused, report = accelerated(make())
    assert [entry.before for entry in report.replaced if entry.path in blocks(report)] == ["Block"] * 4
    assert operator_calls(fused, image(1, 3, 32, 32, dtype=torch.float32)) == {
        "blocks.0.0": LOCAL,
        "blocks.0.1": REDUCED,
        "blocks.1.0": LOCAL,
        "blocks.1.1": REDUCED,
    }


def test_embeddings():
    assert_embeddings_fuse(make(), image(1, 3, 32, 32, dtype=torch.float32), ["patch_embeds.0", "patch_embeds.1"])


def test_positional_encodings():
    stock, x = make(), image(1, 3, 32, 32, dtype=torch.float32)
    fused, report = accelerated(stock, inference=True)
    paths = ["pos_block.0", "pos_block.1"]
    assert [entry.path for entry in report.replaced if entry.path.startswith("pos_block")] == paths
    found = {d.module: d.operator for d in fastvit_kernels.explain(fused, x).decisions if d.module in paths}
    assert found == dict.fromkeys(paths, "depthwise_conv")
    for model in (stock, fused):
        model.pos_block[1].proj[0].register_forward_hook(lambda module, args, output: 2 * output)
    assert_same(stock, fused, x)
    (remark,) = fastvit_kernels.explain(fused, x).unfused
    assert remark.path == "pos_block.1" and remark.reasons == ("the convolution has hooks",)


def test_another_positional_encoding_is_left_alone():
    stock = make()
    stock.pos_block[0].proj.append(nn.GELU())
    fused, report = accelerated(stock)
    (entry,) = report.left_alone
    assert entry.path == "pos_block.0" and "proj is not the one convolution" in entry.reasons[0]
    assert_same(stock, fused, image(1, 3, 32, 32, dtype=torch.float32))


def test_training_step():
    stock = make().double().train()
    fused, _ = accelerated(stock)
    assert_same_step(stock, fused, image(2, 3, 32, 32))


@pytest.mark.parametrize("rate", ["proj_drop_rate", "attn_drop_rate", "drop_path_rate"])
def test_dropouts_draw_the_same_numbers(rate):
    assert_drops_the_same(lambda: make(**{rate: 0.4}), image(4, 3, 32, 32))


def test_attention_dropout_runs_the_attention_unfused_in_training_only():
    model = make(attn_drop_rate=0.3)
    report = fastvit_kernels.accelerate(model)
    x = image(1, 3, 32, 32, dtype=torch.float32)
    assert len(blocks(report)) == 4 and not any(entry.remarks for entry in report.replaced)
    assert operator_calls(model, x)["blocks.0.0"] == LOCAL
    explanation = fastvit_kernels.explain(model.train(), x)
    assert calls_in(explanation) == {path: ["pointwise_mlp"] for path in blocks(report)}
    assert [remark.reasons for remark in explanation.unfused] == [("attention: attention dropout is active",)] * 4


MISTAKES = {
    "padding_masked": ("local_attention", {"pad": "mask"}),
    "window_norm_eps": ("local_attention", {"norm_eps": 1e-5}),
    "query_norm_eps": ("global_attention", {"norm_eps": 1e-5}),
    "keys_norm_eps": ("patch_embedding", {"norm_eps": 1e-6}),
    "keys_input_norm_eps": ("patch_embedding", {"in_norm_eps": 1e-5}),
    "no_shortcut": ("depthwise_conv", {"residual": None}),
    "mlp_norm_eps": ("pointwise_mlp", {"norm_eps": 1e-5}),
    "activation": ("pointwise_mlp", {"activation": "quick_gelu"}),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_single_mistake_shows(monkeypatch, mistake):
    stock = make().double()
    fused, _ = accelerated(stock)
    function, arguments = MISTAKES[mistake]
    x = image(1, 3, 44, 28)
    with torch.no_grad(), planted(monkeypatch, ops, function, **arguments):
        assert relative_l2(logits(fused, x), logits(stock, x)) > 10 * TOLERANCE[x.dtype]
    assert_same(stock, fused, x)


def test_autocast():
    assert_autocast_errs_no_more(make(), image(2, 3, 44, 28, dtype=torch.float32))


@pytest.mark.parametrize("fused_attention", [False, True])
def test_either_attention_of_timm(fused_attention):
    """timm multiplies by its `scale` only where PyTorch's fused attention, which has its own, is not used."""
    stock = make().double()
    for module in stock.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn, module.scale = fused_attention, 0.5
    assert_same(stock, accelerated(stock)[0], image(1, 3, 32, 32))


def test_reversible():
    assert_reversible(make(), image(1, 3, 32, 32, dtype=torch.float32))


class ScaledLinear(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class OtherBlock(twins.Block):
    def forward(self, x, size):
        return 2 * super().forward(x, size)


def hook_on_the_attention(block):
    block.attn.register_forward_hook(lambda module, args, output: 2 * output)


def another_linear(block):
    block.attn.proj = ScaledLinear(16, 16)


def tanh_gelu(block):
    block.mlp.act = nn.GELU("tanh")


def norm_inside_the_mlp(block):
    block.mlp.norm = nn.LayerNorm(32)


def another_norm(block):
    block.norm1 = nn.RMSNorm(16)


def subclass(block):
    block.__class__ = OtherBlock


OBSTACLES = {
    hook_on_the_attention: "attn has hooks",
    another_linear: "the output projection is a ScaledLinear",
    tanh_gelu: "the activation is GELU(approximate='tanh')",
    norm_inside_the_mlp: "mlp.norm is a LayerNorm, expected Identity",
    another_norm: "the layer norm is a RMSNorm",
    subclass: "derives from Block",
}


@pytest.mark.parametrize("change", OBSTACLES, ids=lambda change: change.__name__)
@pytest.mark.parametrize("index", [0, 1], ids=["local", "reduced"])
def test_left_alone_with_reason(change, index):
    stock = make()
    change(stock.blocks[0][index])
    stock.double()
    fused, report = accelerated(stock)
    (entry,) = report.left_alone
    assert len(blocks(report)) == 3 and entry.path == f"blocks.0.{index}"
    assert any(OBSTACLES[change] in reason for reason in entry.reasons), entry.reasons
    assert_same(stock, fused, image(1, 3, 32, 32))


@pytest.mark.parametrize("change", list(OBSTACLES)[:-1], ids=lambda change: change.__name__)
@pytest.mark.parametrize("index", [0, 1], ids=["local", "reduced"])
def test_obstacles_that_come_later_are_noticed(change, index):
    stock = make()
    fused, _ = accelerated(stock, inference=True)
    for model in (stock, fused):
        torch.manual_seed(1)
        change(model.blocks[0][index])
        model.double()
    assert_same(stock, fused, image(1, 3, 32, 32))
    (entry,) = fastvit_kernels.explain(fused, image(1, 3, 32, 32)).unfused
    assert entry.path == f"blocks.0.{index}" and any(OBSTACLES[change] in reason for reason in entry.reasons)


def test_another_timm_is_not_known(monkeypatch):
    monkeypatch.setattr(load_timm(), "__version__", "0.8.23.dev0")
    model = make()
    report = fastvit_kernels.accelerate(model)
    assert not report and "timm from 0.9 on" in str(report) and type(model.blocks[0][0]) is twins.Block


def test_compiled():
    stock = make()
    fused, _ = accelerated(stock, inference=True)
    x = image(1, 3, 32, 32, dtype=torch.float32)
    with torch.no_grad():
        assert relative_l2(torch.compile(fused, fullgraph=True, backend="eager")(x), stock(x)) <= 1e-5


def test_calls_are_repeated():
    assert_repeats(make(), image(1, 3, 32, 32, dtype=torch.float32))
