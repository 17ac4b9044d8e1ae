"""The attentions of timm's Twins by themselves, in somebody else's block."""

from __future__ import annotations

import importlib

import pytest
import torch
from host_parity import (
    TOLERANCE,
    accelerated,
    assert_autocast_errs_no_more,
    assert_repeats,
    assert_reversible,
    assert_same,
    assert_same_step,
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
ATTENTIONS = {
    "local": lambda **options: twins.LocallyGroupedAttn(16, 2, ws=3, **options),
    "reduced": lambda **options: twins.GlobalSubSampleAttn(16, 2, sr_ratio=2, **options),
    "whole": lambda **options: twins.GlobalSubSampleAttn(16, 2, sr_ratio=1, **options),
}
OPERATORS = {
    "local": ["local_attention"],
    "reduced": ["patch_embedding", "global_attention"],
    "whole": ["global_attention"],
}


class Gated(nn.Module):
    """An attention on a map, with a norm that is its owner's own and a gate."""

    def __init__(self, attn):
        super().__init__()
        self.attn, self.gate = attn, nn.Linear(16, 16)

    def forward(self, x):
        rows = nn.functional.rms_norm(x.flatten(2).mT, (16,))
        return self.gate(rows).sigmoid() * self.attn(rows, x.shape[2:])


def make(name, **options):
    torch.manual_seed(0)
    return randomize(Gated(ATTENTIONS[name](**options)))


@pytest.fixture(params=ATTENTIONS)
def name(request):
    return request.param


@pytest.mark.parametrize("inference", [False, True], ids=["plain", "packed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_same_numbers(name, dtype, inference):
    stock = make(name).to(dtype)
    fused, report = accelerated(stock, inference)
    assert [entry.path for entry in report.replaced] == ["attn"] and not report.left_alone
    # Maps of whole windows and others.
    assert_same(stock, fused, *(image(2, 16, *size, dtype=dtype) for size in ((6, 6), (8, 4), (10, 14))))


def test_it_runs_its_operators(name):
    fused, report = accelerated(make(name))
    assert report.replaced[0].before == type(ATTENTIONS[name]()).__name__
    assert operator_calls(fused, image(1, 16, 6, 6, dtype=torch.float32)) == {"attn": OPERATORS[name]}


def test_training_step(name):
    stock = make(name).double().train()
    fused, _ = accelerated(stock)
    assert_same_step(stock, fused, image(2, 16, 6, 8))


@pytest.mark.parametrize("rate", ["proj_drop", "attn_drop"])
def test_dropouts(name, rate):
    """The same random numbers; that of the probabilities runs timm's code, and says so."""
    stock = make(name, **{rate: 0.4}).double().train()
    fused, _ = accelerated(stock)
    x = image(2, 16, 6, 6)
    assert_same_step(stock, fused, x)
    explanation = fastvit_kernels.explain(fused, x)
    unfused = [remark.reasons for remark in explanation.unfused]
    assert unfused == ([("attention: attention dropout is active",)] if rate == "attn_drop" else [])
    assert bool(calls_in(explanation)) == (rate == "proj_drop")


def test_autocast(name):
    assert_autocast_errs_no_more(make(name), image(2, 16, 10, 14, dtype=torch.float32))


def test_reversible(name):
    assert_reversible(make(name), image(1, 16, 6, 6, dtype=torch.float32))


def test_calls_are_repeated(name):
    assert_repeats(make(name), image(1, 16, 6, 6, dtype=torch.float32))


def test_compiled(name):
    stock = make(name)
    fused, _ = accelerated(stock, inference=True)
    x = image(1, 16, 6, 6, dtype=torch.float32)
    with torch.no_grad():
        assert relative_l2(torch.compile(fused, fullgraph=True, backend="eager")(x), stock(x)) <= 1e-5


def test_zeros_around_the_map_take_part(monkeypatch):
    stock = make("local").double()
    fused, _ = accelerated(stock)
    x = image(1, 16, 8, 4)
    with torch.no_grad(), planted(monkeypatch, ops, "local_attention", pad="mask"):
        assert relative_l2(logits(fused, x), logits(stock, x)) > 10 * TOLERANCE[x.dtype]


def test_left_alone_with_reason(name):
    stock = make(name)
    stock.attn.proj.register_forward_hook(lambda module, args, output: 2 * output)
    fused, report = accelerated(stock)
    (entry,) = report.left_alone
    assert not report and entry.path == "attn" and entry.reasons == ("the output projection has hooks",)
    assert_same(stock, fused, image(1, 16, 6, 6, dtype=torch.float32))


def test_inside_a_block_it_is_the_blocks():
    """Accelerated with the block, or left alone with it."""
    block = randomize(twins.Block(16, 2, ws=3))
    report = fastvit_kernels.accelerate(block)
    assert [entry.path for entry in report.replaced] == [""] and type(block.attn) is twins.LocallyGroupedAttn
    fastvit_kernels.restore(block)
    block.norm1 = nn.RMSNorm(16)
    report = fastvit_kernels.accelerate(block)
    assert not report and [entry.path for entry in report.left_alone] == [""]
    x = image(1, 36, 16, dtype=torch.float32)
    explanation = fastvit_kernels.explain(block, x, (6, 6))
    assert [remark.path for remark in explanation.not_accelerated] == [""]


def test_accelerated_first_it_stays_so_inside_its_block():
    block = randomize(twins.Block(16, 2, ws=3)).double()
    x = image(1, 36, 16)
    expected = block(x, (6, 6))
    assert fastvit_kernels.accelerate(block.attn)
    report = fastvit_kernels.accelerate(block)
    (entry,) = [entry for entry in report.left_alone if entry.path == ""]
    assert entry.reasons[0] == "attn is a FusedLocallyGroupedAttn, expected LocallyGroupedAttn"
    assert relative_l2(block(x, (6, 6)), expected) <= TOLERANCE[x.dtype]
    fastvit_kernels.restore(block)
    assert type(block.attn) is twins.LocallyGroupedAttn and fastvit_kernels.accelerate(block)
