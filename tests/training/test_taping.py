"""Blocks that repeat their calls in training compute what their own code does, to the bit, and notice what changes."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import threading
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from training_models import MODELS, assert_close, batch, small

import fastvit_kernels
from fastvit_kernels.nn import chain, tape
from fastvit_kernels.nn.taping import Taped

every_model = pytest.mark.parametrize("name", MODELS)


def step(model, x, y, taping=True, seed=0, forward=None):
    """Loss and gradients of a training step."""
    torch.manual_seed(seed)
    for p in model.parameters():
        p.grad = None
    with fastvit_kernels.use_taping(taping):
        loss = F.cross_entropy((forward or model)(x).float(), y)
        loss.backward()
    return loss.detach(), {n: p.grad for n, p in model.named_parameters()}


def blocks(model):
    return [m for m in model.modules() if isinstance(m, Taped)]


def recorded(model):
    return [0 if b._taping is None else b._taping.recorded for b in blocks(model)]


def record(model):
    x, y = batch()
    for _ in range(2):
        step(model, x, y)
    assert all(recorded(model))


def assert_same(found, expected):
    assert torch.equal(found[0], expected[0])
    for n, grad in expected[1].items():
        assert (found[1][n] is None) == (grad is None), n
        assert grad is None or torch.equal(found[1][n], grad), n


def assert_same_steps(model, other, steps=1, **options):
    """The next steps of `model` are those of `other` without repetition, and so is what they leave behind."""
    x, y = batch()
    for seed in range(steps):
        assert_same(step(model, x, y, seed=seed, **options), step(other, x, y, taping=False, seed=seed))
    for (n, b), other_b in zip(model.named_buffers(), other.buffers(), strict=True):
        assert torch.equal(b, other_b), n


@pytest.fixture
def counted(monkeypatch):
    """How many nodes of chains have been computed."""
    found = []
    run = chain.Chain.run

    def spy(self, inputs):
        found.append(self)
        return run(self, inputs)

    monkeypatch.setattr(chain.Chain, "run", spy)
    return found


@every_model
@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "autocast"])
def test_same_to_the_bit(name, autocast, counted):
    model, other = small(name), small(name)
    forward = None
    if autocast:

        def forward(x):
            with torch.autocast("cpu", torch.bfloat16):
                return model(x)

    x, y = batch()
    for seed in range(5):
        expected_forward = None
        if autocast:

            def expected_forward(x):
                with torch.autocast("cpu", torch.bfloat16):
                    return other(x)

        found = step(model, x, y, seed=seed, forward=forward)
        assert_same(found, step(other, x, y, taping=False, seed=seed, forward=expected_forward))
    assert all(recorded(model)) and not any(recorded(other))
    assert len(counted) >= 3 * len(blocks(model))
    for (n, b), other_b in zip(model.named_buffers(), other.buffers(), strict=True):
        assert torch.equal(b, other_b), n


@pytest.mark.parametrize("name", ["cvt_13", "cmt_xs", "hat_net_tiny"])
def test_random_drops_are_drawn_anew(name):
    options = {"drop_path_rate": 0.5, **({"drop_rate": 0.2} if name == "cmt_xs" else {"depths": (1, 1, 3, 1)})}
    if name == "cvt_13":
        options["depths"] = (1, 1, 3)
    model, other = small(name, **options), small(name, **options)
    assert_same_steps(model, other, steps=6)
    assert any(recorded(model))
    x, y = batch()
    assert len({float(step(model, x, y, seed=seed)[0]) for seed in range(6)}) > 1


def test_running_statistics_and_counts_follow():
    model, other = small("cmt_xs"), small("cmt_xs")
    assert_same_steps(model, other, steps=5)
    counts = [b for n, b in model.named_buffers() if n.endswith("num_batches_tracked")]
    assert counts and all(int(c) == 5 for c in counts)


def test_cumulative_statistics_are_not_repeated():
    """Their momentum is a number that Python makes of a count."""
    models = small("cmt_xs"), small("cmt_xs")
    for model in models:
        for m in model.modules():
            if isinstance(m, nn.BatchNorm2d):
                m.momentum = None
    assert_same_steps(*models, steps=4)
    assert not any(recorded(models[0]))


@every_model
def test_frozen_parts(name):
    model, other = small(name), small(name)
    record(model)
    record(other)
    for m in (model, other):
        for n, p in m.named_parameters():
            p.requires_grad_("proj" in n)
    assert_same_steps(model, other, steps=3)
    assert all(recorded(model))
    for m in (model, other):
        m.requires_grad_(True)
    assert_same_steps(model, other, steps=3)


def test_input_without_and_with_a_gradient():
    model, other = small("pvt_v2_b0"), small("pvt_v2_b0")
    block, plain = blocks(model)[2], blocks(other)[2]
    x = torch.randn(2, 16, len(block.norm1.weight))
    for wanted in (False, False, False, True, True, True, False):
        a, b = (x.clone().requires_grad_(wanted) for _ in range(2))
        block(a, 4, 4).square().sum().backward()
        with fastvit_kernels.use_taping(False):
            plain(b, 4, 4).square().sum().backward()
        assert (a.grad is None) is not wanted and (not wanted or torch.equal(a.grad, b.grad))
    for p, q in zip(block.parameters(), plain.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)


@pytest.mark.parametrize(
    "change",
    [
        lambda m: setattr(m.mlp, "fc2", copy.deepcopy(m.mlp.fc2)),
        lambda m: setattr(m.norm1, "eps", 1e-2),
        lambda m: setattr(m.mlp.fc1, "weight", nn.Parameter(m.mlp.fc1.weight.detach() * 2)),
        lambda m: m.norm2.weight.data.mul_(3),
        lambda m: setattr(m.attn, "forward", lambda *a, **k: type(m.attn).forward(m.attn, *a, **k)),
        lambda m: nn.utils.parametrize.register_parametrization(m.mlp.fc1, "weight", nn.Tanh()),
        lambda m: m.double().float(),
    ],
    ids=["child", "setting", "parameter", "values", "forward", "parametrization", "dtype"],
)
def test_changes_are_noticed(change):
    model, other = small("pvt_v2_b0"), small("pvt_v2_b0")
    record(model)
    for m in (model, other):
        change(blocks(m)[2])
    assert_same_steps(model, other, steps=3)


def test_other_dtype():
    model, other = small("pvt_v2_b0"), small("pvt_v2_b0")
    record(model)
    x, y = batch()
    for m in (model, other):
        m.bfloat16()
    for _ in range(3):
        assert_same(step(model, x.bfloat16(), y), step(other, x.bfloat16(), y, taping=False))


def test_weights_that_move_at_every_step_are_soon_left_alone(monkeypatch):
    model, other = small("pvt_v2_b0"), small("pvt_v2_b0")
    tapes = []
    enter = tape.Tape.__enter__
    monkeypatch.setattr(tape.Tape, "__enter__", lambda self: (tapes.append(self), enter(self))[1])
    for _ in range(8):
        for m in (model, other):
            for p in m.parameters():
                p.data = p.data.clone()
        assert_same_steps(model, other)
    assert len(tapes) <= 4 * len(blocks(model))


def test_other_sizes_have_their_own_records():
    model, other = small("pvt_v2_b0"), small("pvt_v2_b0")
    for seed in range(4):
        for size in (1, 3):
            x, y = batch(size)
            for side in (64, 96):
                image = F.interpolate(x, side)
                assert_same(step(model, image, y, seed=seed), step(other, image, y, taping=False, seed=seed))
    x, y = batch()
    for _ in range(3):
        step(model, x, y)
    assert all(recorded(model))


def test_evaluation_between_steps():
    model, other = small("cmt_xs"), small("cmt_xs")
    x, _ = batch()
    for _ in range(3):
        assert_same_steps(model, other, steps=2)
        with torch.no_grad():
            assert torch.equal(model.eval()(x), other.eval()(x))
        model.train(), other.train()
    assert all(recorded(model))


@pytest.mark.parametrize("where", ["block", "submodule", "parameter", "tensor"])
def test_hooks_are_called(where):
    model, other = small("pvt_v2_b0"), small("pvt_v2_b0")
    record(model)
    calls = []

    def hook(*_):
        calls.append(1)

    for block in (blocks(model)[2], blocks(other)[2]):
        if where == "block":
            block.register_forward_hook(hook)
            block.register_full_backward_hook(hook)
        elif where == "submodule":
            block.mlp.register_forward_hook(hook)
        elif where == "parameter":
            block.mlp.fc1.weight.register_post_accumulate_grad_hook(hook)
        else:
            block.mlp.fc1.weight.register_hook(hook)
    assert_same_steps(model, other, steps=2)
    assert len(calls) == 4 * (2 if where == "block" else 1)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(reentrant):
    model, other = small("cvt_13"), small("cvt_13")
    record(model)
    x, y = batch()
    x.requires_grad_()
    block = model.stage2.blocks[0]
    forward = block.forward
    block.forward = lambda *inputs: checkpoint(forward, *inputs, use_reentrant=reentrant)
    for _ in range(3):
        # A checkpoint takes the batch's statistics twice: gradients are the same, running statistics are not.
        assert_same(step(model, x, y), step(other, x, y, taping=False))


@every_model
def test_double_backward(name):
    found = []
    for taping in (True, False):
        model = small(name)
        if taping:
            record(model)
        else:
            x, y = batch()
            for _ in range(2):
                step(model, x, y, taping=False)
        model.zero_grad()
        with fastvit_kernels.use_taping(taping):
            x, y = batch()
            x.requires_grad_()
            (gx,) = torch.autograd.grad(F.cross_entropy(model(x), y), x, create_graph=True)
            gx.square().sum().backward()
        found.append({n: p.grad for n, p in model.named_parameters()})
    assert_close(*found, tolerance=1e-3)


def test_graph_kept_and_several_forwards_before_a_backward():
    model, other = small("cmt_xs"), small("cmt_xs")
    record(model)
    record(other)
    x, y = batch()
    for m, taping in ((model, True), (other, False)):
        m.zero_grad()
        with fastvit_kernels.use_taping(taping):
            first, second = F.cross_entropy(m(x), y), F.cross_entropy(m(x * 2), y)
            first.backward(retain_graph=True)
            second.backward()
            first.backward()
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)


def test_weights_changed_before_the_backward_are_noticed():
    model = small("pvt_v2_b0")
    record(model)
    x, y = batch()
    loss = F.cross_entropy(model(x), y)
    with torch.no_grad():
        blocks(model)[2].mlp.fc1.weight.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("way", ["saved tensor hooks", "anomalies", "functional_call", "explain"])
def test_who_looks_inside_gets_the_own_code(way, counted):
    model, other = small("pvt_v2_b0"), small("pvt_v2_b0")
    record(model)
    x, y = batch()
    expected = step(other, x, y, taping=False)
    counted.clear()
    if way == "saved tensor hooks":
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t):
            found = step(model, x, y)
    elif way == "anomalies":
        with torch.autograd.set_detect_anomaly(True):
            found = step(model, x, y)
    elif way == "functional_call":
        parameters = dict(model.named_parameters())
        found = step(model, x, y, forward=lambda x: torch.func.functional_call(model, parameters, x))
    else:
        assert fastvit_kernels.explain(model, x, training=True).decisions
        found = expected
    assert_same(found, expected)
    assert not counted or way == "functional_call"


@pytest.mark.parametrize("way", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), "save"])
def test_copies_record_for_themselves(way):
    model = small("cmt_xs")
    record(model)
    if way == "save":
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    else:
        other = way(model)
    assert not any(recorded(other))
    reference = copy.deepcopy(model)
    assert_same_steps(other, reference, steps=3)
    assert all(recorded(other))


def test_nothing_outlives_a_step():
    model = small("cmt_xs")
    record(model)
    x, y = batch()
    out = model(x)
    F.cross_entropy(out, y).backward()
    seen = weakref.ref(out)
    node = weakref.ref(x)
    del out, x
    gc.collect()
    assert seen() is None and node() is None
    owner = weakref.ref(blocks(model)[0])
    del model
    gc.collect()
    assert owner() is None


def test_threads():
    model = small("pvt_v2_b0")
    record(model)
    x, _ = batch()
    expected = [torch.autograd.grad(model(x * k).sum(), tuple(model.parameters())) for k in range(1, 5)]
    found = [None] * 4

    def run(k):
        for _ in range(3):
            found[k] = torch.autograd.grad(model(x * (k + 1)).sum(), tuple(model.parameters()))

    threads = [threading.Thread(target=run, args=(k,)) for k in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    for a, b in zip(found, expected, strict=True):
        assert all(torch.equal(g, e) for g, e in zip(a, b, strict=True))


def test_recompute_and_backend_have_their_own_records():
    model, other = small("cmt_xs"), small("cmt_xs")
    x, y = batch()
    for setting in (True, None, True, None, True, None):
        with fastvit_kernels.use_recompute(setting):
            assert_same(step(model, x, y), step(other, x, y, taping=False))
    with fastvit_kernels.use_backend("reference"):
        for _ in range(3):
            assert_same(step(model, x, y), step(other, x, y, taping=False))


def test_few_nodes():
    """A block whose calls follow each other is one node between its inputs and its result."""
    model = small("cmt_xs")
    record(model)
    block = blocks(model)[2]
    x = torch.randn(3, 16, len(block.norm1.weight), requires_grad=True)
    for _ in range(3):
        out = block(x, 4, 4, model.relative_pos_c)
    assert type(out.grad_fn).__name__ == "_ChainedBackward"
    assert {type(n).__name__ for n, _ in out.grad_fn.next_functions if n is not None} == {"AccumulateGrad"}
