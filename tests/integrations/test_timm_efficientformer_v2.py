"""timm's EfficientFormerV2: the MLPs on depthwise_mlp, everything else timm's own."""

from __future__ import annotations

import importlib

import pytest
import torch
from host_parity import (
    TOLERANCE,
    accelerated,
    assert_autocast_errs_no_more,
    assert_drops_the_same,
    assert_repeats,
    assert_reversible,
    assert_same,
    assert_same_step,
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
from fastvit_kernels.bench.suites import efficientformer_v2 as published
from fastvit_kernels.testing import relative_l2

load_timm()
efficientformer_v2 = importlib.import_module("timm.models.efficientformer_v2")

MLPS = [f"stages.{stage}.blocks.0.mlp" for stage in range(3)]


def make(**options):
    """A block of convolutions on 8 x 8 and on 4 x 4 pixels, one with attention on 2 x 2."""
    small = {"img_size": 32, "num_classes": 7, "embed_dims": (12, 16, 16), "depths": (1, 1, 1), "mlp_ratios": (2, 3, 2)}
    torch.manual_seed(0)
    return randomize(efficientformer_v2.EfficientFormerV2(**{**small, "num_vit": 1, **options}))


@pytest.mark.parametrize("inference", [False, True], ids=["plain", "packed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_same_numbers(dtype, inference):
    stock = make().to(dtype)
    fused, report = accelerated(stock, inference)
    assert [entry.path for entry in report.replaced] == MLPS and not report.left_alone
    x = image(2, 3, 32, 32, dtype=dtype)
    assert_same(stock, fused, x, x.to(memory_format=torch.channels_last))
    assert operator_calls(fused, x) == {path: ["depthwise_mlp"] for path in MLPS}


def test_batch_norms_in_training():
    stock = make().double().train()
    fused, _ = accelerated(stock)
    for _ in range(2):
        assert_same_step(stock, fused, image(3, 3, 32, 32))
    # The steps have moved the running statistics.
    assert_same(stock.eval(), fused.eval(), image(2, 3, 32, 32))


@pytest.mark.parametrize("frozen", [1, 3])
def test_frozen_batch_norms(frozen):
    stock = make().double().train()
    fused, _ = accelerated(stock)
    for model in (stock, fused):
        mlp = model.stages[0].blocks[0].mlp
        for part in (mlp.mid, mlp.fc1, mlp.fc2)[:frozen]:
            part.bn.eval()
    x = image(3, 3, 32, 32)
    assert_same_step(stock, fused, x)
    reasons = [remark.reasons for remark in fastvit_kernels.explain(fused, x).unfused]
    assert reasons == ([("the batch norms are in different modes",)] if frozen < 3 else [])


@pytest.mark.parametrize("rate", ["proj_drop_rate", "drop_path_rate"])
def test_dropouts_draw_the_same_numbers(rate):
    assert_drops_the_same(lambda: make(**{rate: 0.4}), image(4, 3, 32, 32))


def test_dropout_runs_the_mlp_unfused_in_training_only():
    model = make(proj_drop_rate=0.3)
    assert len(fastvit_kernels.accelerate(model).replaced) == 3
    x = image(3, 3, 32, 32, dtype=torch.float32)
    assert list(operator_calls(model, x)) == MLPS
    explanation = fastvit_kernels.explain(model.train(), x)
    assert not explanation.decisions
    assert [remark.reasons for remark in explanation.unfused] == [("a dropout is active or has hooks",)] * 3


MISTAKES = {
    "batch_norm_behind_the_activation": {"bn_after_activation": True},
    "other_activation": {"activation": "quick_gelu"},
    "other_hidden_activation": {"hidden_activation": "relu"},
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_single_mistake_shows(monkeypatch, mistake):
    stock = make().double()
    fused, _ = accelerated(stock)
    x = image(1, 3, 32, 32)
    with torch.no_grad(), planted(monkeypatch, ops, "depthwise_mlp", **MISTAKES[mistake]):
        assert relative_l2(logits(fused, x), logits(stock, x)) > 10 * TOLERANCE[x.dtype]


def test_another_epsilon_shows():
    stock = make().double()
    fused, _ = accelerated(stock)
    fused.stages[0].blocks[0].mlp.mid.bn.eps *= 10
    x = image(1, 3, 32, 32)
    with torch.no_grad():
        assert relative_l2(logits(fused, x), logits(stock, x)) > 10 * TOLERANCE[x.dtype]


def test_the_benchmarks_shapes_are_those_of_timms_models():
    found = set()
    for size in ("s0", "s1", "s2", "l"):
        with torch.device("meta"):
            model = getattr(efficientformer_v2, f"efficientformerv2_{size}")()
        for index, stage in enumerate(model.stages):
            side, mlps = 224 >> (2 + index), [block.mlp for block in stage.blocks]
            found |= {((side, side), mlp.fc1.conv.in_channels, mlp.fc1.conv.out_channels) for mlp in mlps}
    assert found == {(shape.grid, shape.channels, shape.hidden) for shape in published.mlps()}


def test_autocast():
    assert_autocast_errs_no_more(make(), image(2, 3, 32, 32, dtype=torch.float32))


def test_reversible():
    assert_reversible(make(), image(1, 3, 32, 32, dtype=torch.float32))


def no_convolution(block):
    block.mlp = efficientformer_v2.ConvMlpWithNorm(12, 24, mid_conv=False).eval()


def another_activation(block):
    block.mlp.mid.bn.act = nn.Tanh()


def hook_on_a_batch_norm(block):
    block.mlp.fc1.bn.register_forward_hook(lambda module, args, output: 2 * output)


def hook_on_a_convolution(block):
    block.mlp.mid.conv.register_forward_hook(lambda module, args, output: 2 * output)


def another_last_norm(block):
    block.mlp.fc2.bn = nn.InstanceNorm2d(12)


OBSTACLES = {
    no_convolution: "it has no convolution in the middle (mid_conv)",
    another_activation: "the activation is Tanh()",
    hook_on_a_batch_norm: "fc1.bn has hooks",
    hook_on_a_convolution: "the depthwise convolution has hooks",
    another_last_norm: "fc2's batch norm is a InstanceNorm2d",
}


@pytest.mark.parametrize("change", OBSTACLES, ids=lambda change: change.__name__)
def test_left_alone_with_reason(change):
    stock = make()
    change(stock.stages[0].blocks[0])
    fused, report = accelerated(stock.double())
    (entry,) = report.left_alone
    assert entry.path == MLPS[0] and any(OBSTACLES[change] in reason for reason in entry.reasons), entry.reasons
    assert_same(stock, fused, image(1, 3, 32, 32))


@pytest.mark.parametrize("change", list(OBSTACLES)[1:], ids=lambda change: change.__name__)
def test_obstacles_that_come_later_are_noticed(change):
    stock = make()
    fused, _ = accelerated(stock, inference=True)
    for model in (stock, fused):
        change(model.stages[0].blocks[0])
    x = image(1, 3, 32, 32, dtype=torch.float32)
    assert_same(stock, fused, x)
    (entry,) = fastvit_kernels.explain(fused, x).unfused
    assert entry.path == MLPS[0] and any(OBSTACLES[change] in reason for reason in entry.reasons)


def test_compiled():
    stock = make()
    fused, _ = accelerated(stock, inference=True)
    x = image(1, 3, 32, 32, dtype=torch.float32)
    with torch.no_grad():
        assert relative_l2(torch.compile(fused, fullgraph=True, backend="eager")(x), stock(x)) <= 1e-5


def test_calls_are_repeated():
    assert_repeats(make(), image(1, 3, 32, 32, dtype=torch.float32))
