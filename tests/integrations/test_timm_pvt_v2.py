"""timm's PVTv2 on fused operators: the same numbers in every mode, timm's own code where that is impossible."""

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
pvt_v2 = importlib.import_module("timm.models.pvt_v2")

BLOCKS = ["stages.0.blocks.0", "stages.0.blocks.1", "stages.1.blocks.0"]
OPERATORS = ["patch_embedding", "global_attention", "depthwise_mlp"]


def make(**options):
    """Two blocks with keys reduced by 3 on 8 x 8 pixels, one with all keys on 4 x 4."""
    small = {"num_classes": 7, "embed_dims": (16, 32), "depths": (2, 1), "num_heads": (1, 2), "sr_ratios": (3, 1)}
    torch.manual_seed(0)
    return randomize(pvt_v2.PyramidVisionTransformerV2(**{**small, "mlp_ratios": (2, 3), **options}))


@pytest.mark.parametrize("options", [{}, {"linear": True}, {"qkv_bias": False}], ids=["reduced", "linear", "no_bias"])
@pytest.mark.parametrize("inference", [False, True], ids=["plain", "packed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_same_numbers(dtype, inference, options):
    stock = make(**options).to(dtype)
    fused, report = accelerated(stock, inference)
    assert blocks(report) == BLOCKS and not report.left_alone
    assert_same(stock, fused, image(2, 3, 32, 32, dtype=dtype), image(1, 3, 45, 31, dtype=dtype))


@pytest.mark.parametrize("linear", [False, True])
def test_every_block_runs_its_operators(linear):
    fused, _ = accelerated(make(linear=linear))
    calls = operator_calls(fused, image(1, 3, 32, 32, dtype=torch.float32))
    assert list(calls) == BLOCKS and all(operators[-2:] == OPERATORS[1:] for operators in calls.values())
    assert linear or all(operators == OPERATORS for operators in calls.values())


def test_embeddings():
    assert_embeddings_fuse(make(), image(1, 3, 32, 32, dtype=torch.float32), ["patch_embed", "stages.1.downsample"])


@pytest.mark.parametrize("linear", [False, True])
def test_training_step(linear):
    stock = make(linear=linear).double().train()
    fused, _ = accelerated(stock)
    assert_same_step(stock, fused, image(2, 3, 32, 32))


@pytest.mark.parametrize("rate", ["proj_drop_rate", "attn_drop_rate", "drop_path_rate"])
def test_dropouts_draw_the_same_numbers(rate):
    assert_drops_the_same(lambda: make(**{rate: 0.4}), image(4, 3, 32, 32))


@pytest.mark.parametrize(
    ("rate", "left", "reason"),
    [
        ("attn_drop_rate", ["depthwise_mlp"], "attention: attention dropout is active"),
        ("proj_drop_rate", ["patch_embedding", "global_attention"], "mlp: a dropout is active or has hooks"),
    ],
)
def test_dropouts_run_a_half_unfused_in_training_only(rate, left, reason):
    model = make(**{rate: 0.3})
    report = fastvit_kernels.accelerate(model)
    assert blocks(report) == BLOCKS and not any(entry.remarks for entry in report.replaced)
    x = image(1, 3, 32, 32, dtype=torch.float32)
    assert all(operators == OPERATORS for operators in operator_calls(model, x).values())
    explanation = fastvit_kernels.explain(model.train(), x)
    assert calls_in(explanation) == dict.fromkeys(BLOCKS, left)
    assert [remark.reasons for remark in explanation.unfused] == [(reason,)] * 3


# timm's norms have epsilon 1e-6 in front of both halves, 1e-5 behind the reduction.
MISTAKES = {
    "query_norm_eps": ("global_attention", {"norm_eps": 1e-5}),
    "reduction_norm_eps": ("patch_embedding", {"norm_eps": 1e-6}),
    "reduction_input_norm_eps": ("patch_embedding", {"in_norm_eps": 1e-5}),
    "mlp_norm_eps": ("depthwise_mlp", {"norm_eps": 1e-5}),
    "activation": ("depthwise_mlp", {"activation": "quick_gelu"}),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_single_mistake_shows(monkeypatch, mistake):
    stock = make().double()
    fused, _ = accelerated(stock)
    function, arguments = MISTAKES[mistake]
    x = image(1, 3, 32, 32)
    with torch.no_grad(), planted(monkeypatch, ops, function, **arguments):
        assert relative_l2(logits(fused, x), logits(stock, x)) > 10 * TOLERANCE[x.dtype]


@pytest.mark.parametrize("linear", [False, True])
def test_autocast(linear):
    assert_autocast_errs_no_more(make(linear=linear), image(2, 3, 45, 31, dtype=torch.float32))


def test_reversible():
    assert_reversible(make(), image(1, 3, 32, 32, dtype=torch.float32))


@pytest.mark.parametrize("linear", [False, True])
def test_calls_are_repeated(linear):
    assert_repeats(make(linear=linear), image(1, 3, 32, 32, dtype=torch.float32))


def hook_on_the_attention(block):
    block.attn.register_forward_hook(lambda module, args, output: 2 * output)


def hook_on_the_reduction(block):
    block.attn.sr.register_forward_hook(lambda module, args, output: 2 * output)


def hook_on_an_identity(block):
    block.mlp.relu.register_forward_hook(lambda module, args, output: 2 * output)


def tanh_gelu(block):
    block.mlp.act = nn.GELU("tanh")


def another_norm(block):
    block.norm2 = nn.RMSNorm(16)


OBSTACLES = {
    hook_on_the_attention: "attn has hooks",
    hook_on_the_reduction: "the convolution has hooks",
    hook_on_an_identity: "mlp.relu has hooks",
    tanh_gelu: "the activation is GELU(approximate='tanh')",
    another_norm: "the layer norm is a RMSNorm",
}


@pytest.mark.parametrize("change", OBSTACLES, ids=lambda change: change.__name__)
def test_obstacles_are_reported_and_noticed_later(change):
    stock = make()
    later, _ = accelerated(stock, inference=True)
    for model in (stock, later):
        change(model.stages[0].blocks[1])
    x = image(1, 3, 32, 32, dtype=torch.float32)
    now, report = accelerated(stock)
    (entry,) = report.left_alone
    (remark,) = fastvit_kernels.explain(later, x).unfused
    for path, reasons in ((entry.path, entry.reasons), (remark.path, remark.reasons)):
        assert path == BLOCKS[1] and any(OBSTACLES[change] in reason for reason in reasons), reasons
    assert_same(stock, now, x)
    assert_same(stock, later, x)


def test_compiled():
    stock = make()
    fused, _ = accelerated(stock, inference=True)
    x = image(1, 3, 32, 32, dtype=torch.float32)
    with torch.no_grad():
        assert relative_l2(torch.compile(fused, fullgraph=True, backend="eager")(x), stock(x)) <= 1e-5
