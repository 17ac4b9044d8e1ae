"""Neighbouring calls of operators run as one, with the same results, and step back where that would be wrong."""

from __future__ import annotations

import copy
import gc
import threading

import pytest
import torch

import fastvit_kernels
from fastvit_kernels.models import create_model
from fastvit_kernels.nn import plans

MODELS = {
    "cvt_13": {"depths": (1, 1, 2), "embed_dims": (16, 32, 48), "num_heads": (1, 2, 3)},
    "hat_net_tiny": {},
    "cmt_ti": {"img_size": (64, 96)},
    "dhvt_tiny_imagenet_patch16": {"depth": 2},
    "pvt_v2_b0": {},
    "mit_b0": {},
}


def image(*size, seed=3):
    x = torch.randn(*size, generator=torch.Generator().manual_seed(seed))
    return x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x


def make(name, dtype=torch.float32):
    torch.manual_seed(0)
    model = create_model(name, num_classes=7, **MODELS[name]).eval().to(dtype)
    fastvit_kernels.accelerate(model, inference=True)
    return model


def program_of(model):
    """The only record."""
    (program,) = model._repeater._records.programs.values()
    return program


@pytest.fixture
def model():
    model = make("mit_b0")
    with torch.no_grad():
        for _ in range(3):
            model(image(1, 3, 64, 64))
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_plans_give_the_bits_of_single_calls(name, dtype):
    model = make(name, dtype)
    examples, others = [image(2, 3, 64, 96, seed=seed).to(dtype) for seed in (3, 4)]
    with torch.no_grad():
        for _ in range(3):
            model(examples)
        program = program_of(model)
        assert program._planned is not None
        # Not only the inputs that the plan was made with.
        found, planned = model(others), program._planned
        program._planned = None
        expected = model(others)
    assert planned is not None and torch.equal(found, expected)
    left = [step for step in plans.plan(program._calls, [others])[0].steps if plans._is_operator(step, program._calls)]
    assert not left


@pytest.mark.parametrize("name", MODELS)
def test_plans_in_inference_mode(name):
    """Views of weights have other version counters there while the calls are recorded: they are packed again."""
    model, x = make(name), image(1, 3, 64, 96)
    with torch.inference_mode():
        results = [model(x) for _ in range(4)]
    assert program_of(model)._planned is not None
    assert all(torch.equal(results[0], other) for other in results[1:])


def test_blocks_with_a_gated_class_token_are_one_plan():
    model = make("dhvt_tiny_imagenet_patch16")
    x = image(1, 3, 64, 64)
    with torch.no_grad():
        for _ in range(3):
            before = model(x)
        program = program_of(model)
        steps, numbers = plans.plan(program._calls, [x])
        plans.forget(numbers)
        # The stem, the blocks, the classifier.
        assert [step.function for step in steps.steps].count(plans.replay) == len(numbers) == 3
        # The gate's weights are read where they lie, in a plan as well.
        for change in (lambda t: t.mul_(1.5), lambda t: t.data.mul_(1.5)):
            change(model.blocks[0].mlp.compress.weight)
            found, expected = model(x), copy.deepcopy(model)(x)
            assert program_of(model) is program
            assert torch.equal(found, expected) and not torch.equal(found, before)
            before = found


def test_results_are_fresh_tensors(model):
    with torch.no_grad():
        first = model(image(1, 3, 64, 64, seed=4))
        kept = first.clone()
        second = model(image(1, 3, 64, 64, seed=5))
    assert first.data_ptr() != second.data_ptr()
    assert torch.equal(first, kept)


def test_a_write_that_only_the_samples_show(model):
    with torch.no_grad():
        before = model(image(1, 3, 64, 64))
        module = next(m for m in model.modules() if isinstance(m, fastvit_kernels.nn.MixFFN))
        module.fc1.weight.data.mul_(3.0)
        found = model(image(1, 3, 64, 64))
        expected = copy.deepcopy(model)(image(1, 3, 64, 64))
    assert not torch.equal(found, before)
    assert torch.equal(found, expected)


def test_threads_do_not_share_the_memory_of_a_plan(model):
    images = [image(1, 3, 64, 64, seed=seed) for seed in range(4)]
    with torch.no_grad():
        expected = [model(x) for x in images]
    failures = []

    def work(x, y):
        with torch.no_grad():
            failures.extend(1 for _ in range(20) if not torch.equal(model(x), y))

    threads = [threading.Thread(target=work, args=pair) for pair in zip(images, expected, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_plans_go_with_their_model():
    model = make("mit_b0")
    with torch.no_grad():
        for _ in range(3):
            model(image(1, 3, 64, 64))
        _, later = plans.plan(program_of(model)._calls, [image(1, 3, 64, 64)])
    plans.forget(later)
    own = range(later[0] - len(later), later[0])
    del model
    gc.collect()
    for number in (*own, *later, 0, -1):
        with pytest.raises(RuntimeError, match="no such plan"):
            plans.replay([], number)


def test_inputs_that_are_not_the_plans(model):
    x = image(1, 3, 64, 64)
    with torch.no_grad():
        _, (first, *others) = plans.plan(program_of(model)._calls, [x])
    assert plans.replay([x], first)
    transposed = x.contiguous()
    for wrong in ([], [x, x], [x[:, :, :32]], [x.double()], [x.bfloat16()], [x[:0]], [transposed]):
        with pytest.raises(RuntimeError, match="inputs: "):
            plans.replay(wrong, first)
    plans.forget([first, *others])


def test_nothing_is_planned_of_too_much(model, monkeypatch):
    monkeypatch.setattr(plans, "_MOST_BYTES", 1000)
    calls = program_of(model)._calls
    with torch.no_grad():
        assert plans.plan(calls, [image(1, 3, 64, 64)]) == (calls, [])


def test_an_error_while_planning_ends_the_recording(model, monkeypatch):
    def fail(*arguments):
        raise KeyboardInterrupt

    calls = program_of(model)._calls
    monkeypatch.setattr(plans, "_make", fail)
    with torch.no_grad(), pytest.raises(KeyboardInterrupt):
        plans.plan(calls, [image(1, 3, 64, 64)])
    with pytest.raises(RuntimeError, match="plan_begin"):
        torch.ops.fastvit.plan_end([], [])


def test_inputs_that_overlap_are_not_planned():
    x = image(2, 6, 8)
    weight = torch.eye(8)
    torch.ops.fastvit.plan_begin()
    fastvit_kernels.ops.pointwise_mlp(x, weight, None, weight, None, activation="gelu", backend="cpu")
    assert torch.ops.fastvit.plan_end([x, x[:1]], []) == 0


def test_weights_packed_for_one_call_are_not_planned():
    x, weight = image(2, 6, 8), torch.eye(8)
    torch.ops.fastvit.plan_begin()
    out = fastvit_kernels.ops.pointwise_mlp(x, weight, None, weight, None, activation="gelu", backend="cpu")
    assert torch.ops.fastvit.plan_end([x], [out]) == 0
