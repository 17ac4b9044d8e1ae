"""Training steps of whole models on the fused operators are those of the reference."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from training_models import MODELS, WITHOUT_BATCH_NORM, assert_close, batch, fused_calls, gradients, on_reference, small

from fastvit_kernels.ops.library import operators

every_model = pytest.mark.parametrize("name", MODELS)


@every_model
def test_gradients(name):
    model = small(name)
    x, y = batch()
    expected_loss, expected = on_reference(model, x, y, torch.float64)
    with fused_calls() as calls:
        loss, found = gradients(model, x, y)
    assert calls
    assert abs(float(loss) - float(expected_loss)) <= 1e-5 * abs(float(expected_loss))
    assert_close(found, expected)


@every_model
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_autocast(name, dtype):
    model = small(name)
    x, y = batch(4)
    _, exact = on_reference(model, x, y, torch.float64)
    with torch.autocast("cpu", dtype):
        _, expected = on_reference(model, x, y)
        _, found = gradients(model, x, y)
    assert all(g is None or (g.dtype is torch.float32 and bool(g.isfinite().all())) for g in found.values())

    def error(grads):
        pairs = [(g, exact[name]) for name, g in grads.items() if g is not None]
        return sum(float((g.double() - e).square().sum()) for g, e in pairs) ** 0.5

    norm = sum(float(g.square().sum()) for g in exact.values() if g is not None) ** 0.5
    assert error(found) <= 2 * error(expected) + torch.finfo(dtype).eps * norm


@every_model
def test_channels_last(name):
    model, other = small(name), small(name).to(memory_format=torch.channels_last)
    x, y = batch()
    _, expected = gradients(model, x, y)
    _, found = gradients(other, x.contiguous(memory_format=torch.channels_last), y)
    assert_close(found, expected)


@every_model
def test_checkpointing(name):
    model, other = small(name), small(name)
    x, y = batch()
    _, expected = gradients(model, x, y)
    _, found = gradients(other, x, y, forward=lambda x: checkpoint(other, x, use_reentrant=False))
    assert_close(found, expected, tolerance=1e-6)


@pytest.mark.parametrize("name", WITHOUT_BATCH_NORM)
def test_accumulation_is_a_large_batch(name):
    model, other = small(name), small(name)
    x, y = batch(4)
    _, expected = gradients(model, x, y)
    for half in (slice(0, 2), slice(2, 4)):
        _, found = gradients(other, x[half], y[half], weight=0.5)
    assert_close(found, expected)


@every_model
def test_frozen_parts_cost_no_gradient(name):
    """Only one weight of the model is trained: nothing else has a gradient, nor is one asked of any operator."""
    model, other = small(name), small(name)
    x, y = batch()
    _, expected = gradients(other, x, y)
    wanted = next(n for n in reversed(list(expected)) if expected[n] is not None and ("proj" in n or "fc2" in n))
    for n, p in model.named_parameters():
        p.requires_grad_(n == wanted)
    with fused_calls() as calls:
        _, found = gradients(model, x, y)
    assert [n for n, g in found.items() if g is not None] == [wanted]
    assert_close({wanted: found[wanted]}, {wanted: expected[wanted]})
    asked = [needs[i] for name, needs in calls for i in operators[name.removesuffix("_backward")].parameters]
    assert calls and sum(asked) <= 1


@every_model
def test_frozen_model_runs_no_backward(name):
    model = small(name).requires_grad_(False)
    x, y = batch()
    head = torch.nn.Linear(5, 5)
    with fused_calls() as calls:
        F.cross_entropy(head(model(x)), y).backward()
    assert not calls and head.weight.grad is not None


@pytest.mark.parametrize("name", ["cvt_13", "hat_net_tiny"])
def test_double_backward(name):
    """The gradient of the gradient's norm (a gradient penalty)."""
    found = []
    for backend in (None, "reference"):
        model = small(name, backend=backend)
        x, y = batch()
        x.requires_grad_()
        (gx,) = torch.autograd.grad(F.cross_entropy(model(x), y), x, create_graph=True)
        gx.square().sum().backward()
        found.append({n: p.grad for n, p in model.named_parameters()})
    assert_close(*found, tolerance=1e-3)


def test_grad_scaler_skips_overflow():
    """fp16 with a loss scale: a step whose gradients overflow changes nothing and lowers the scale."""
    model = small("pvt_v2_b0")
    x, y = batch()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    before = copy.deepcopy(model.state_dict())
    for scale, moved in ((float("inf"), False), (1.0, True)):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.float16):
            loss = F.cross_entropy(model(x), y)
        scaler.scale(loss * scale).backward()
        old = scaler.get_scale()
        scaler.step(optimizer)
        scaler.update()
        changed = any(not torch.equal(t, before[n]) for n, t in model.state_dict().items())
        assert changed is moved and (scaler.get_scale() < old) is not moved


def test_step_in_one_graph():
    model, other = small("cvt_13"), small("cvt_13")
    x, y = batch()
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.01, momentum=0.9) for m in (model, other)]

    def step(m, optimizer):
        optimizer.zero_grad(set_to_none=True)
        F.cross_entropy(m(x), y).backward()
        optimizer.step()

    torch.compiler.reset()
    forward = torch.compile(lambda: F.cross_entropy(other(x), y), fullgraph=True, backend="aot_eager")
    # PyTorch's own decorator of `step` breaks the graph, so this one cannot be whole.
    update = torch.compile(optimizers[1].step, backend="aot_eager")
    for _ in range(2):
        step(model, optimizers[0])
        optimizers[1].zero_grad(set_to_none=True)
        forward().backward()
        update()
    torch.compiler.reset()
    found, expected = ({n: t.double() for n, t in m.state_dict().items()} for m in (other, model))
    assert_close(found, expected, tolerance=1e-5)
