"""explain: which backend ran what, why the others did not, and that asking changes nothing."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.modules import module as torch_module
from torch.utils.checkpoint import checkpoint

import fastvit_kernels
from fastvit_kernels import _extension, ops
from fastvit_kernels.models import create_model
from fastvit_kernels.nn import PointwiseMLP
from fastvit_kernels.ops.library import operators

TINY = {"depths": (1, 1, 2), "embed_dims": (16, 32, 64), "num_heads": (1, 2, 4), "num_classes": 7}


@pytest.fixture(autouse=True)
def usual_choice():
    """Whatever FASTVIT_BACKEND says."""
    with fastvit_kernels.use_backend("auto"):
        yield


@pytest.fixture
def image():
    return torch.randn(2, 3, 48, 64, generator=torch.Generator().manual_seed(3))


def usual():
    return "cpu" if _extension.parts["cpu"].loaded else "reference"


def test_decisions_of_an_accelerated_model(tiny_cvt, image):
    model = tiny_cvt()
    fastvit_kernels.accelerate(model)
    explanation = fastvit_kernels.explain(model, image)
    assert len(explanation.decisions) == 21 and not explanation.unfused and not explanation.not_accelerated
    first = explanation.decisions[1]
    assert (first.module, first.operator) == ("cvt.encoder.stages.0.layers.0", "conv_projection")
    assert first.shape == "(2, 192, 16) float32 cpu" and first.chosen == usual()
    for decision in explanation.decisions:
        backends = {"reference", *(backend.name for backend in operators[decision.operator].backends)}
        assert set(decision.rejected) == backends - {decision.chosen} and all(map(all, decision.rejected.values()))
    text = str(explanation)
    assert "cvt.encoder.stages.2.layers.2" in text and "why not the others" in text
    assert "on a CPU Triton only interprets" in text


def test_the_reasons_follow_the_call(tiny_cvt, image):
    model = tiny_cvt()
    fastvit_kernels.accelerate(model)
    double = fastvit_kernels.explain(copy.deepcopy(model).double(), image.double())
    assert {decision.chosen for decision in double.decisions} == {"reference"}
    assert any("float64" in reason for reason in double.decisions[0].rejected["cpu"])
    with fastvit_kernels.use_backend("reference"):
        chosen = fastvit_kernels.explain(model, image)
    assert {decision.chosen for decision in chosen.decisions} == {"reference"}
    assert any("'reference' was asked for" in reason for reason in chosen.decisions[0].rejected["cpu"])
    with fastvit_kernels.use_backend("cuda"), pytest.raises(fastvit_kernels.BackendError, match="no cuda kernels"):
        fastvit_kernels.explain(model, image)
    assert not torch_module._global_forward_hooks and not torch_module._global_forward_pre_hooks


def test_a_model_that_is_not_accelerated(tiny_cvt, image):
    model = tiny_cvt()
    model.cvt.encoder.stages[0].layers[0].intermediate.activation = nn.ReLU()
    explanation = fastvit_kernels.explain(model, image)
    assert not explanation.decisions and len(explanation.not_accelerated) == 9
    first, second = explanation.not_accelerated[1:3]
    assert first.path == "cvt.encoder.stages.0.layers.0" and "the activation is ReLU()" in first.reasons[0]
    assert second.reasons == ("accelerate(model) would replace it",)
    assert "no fused operator ran" in str(explanation) and "not accelerated" in str(explanation)


def test_unfused_parts_and_why(tiny_cvt, image):
    model = tiny_cvt(attention_drop_rate=[0.0, 0.0, 0.5])
    fastvit_kernels.accelerate(model)
    model.cvt.encoder.stages[0].layers[0].output.dense.register_forward_hook(lambda *args: None)
    (hooked,) = fastvit_kernels.explain(model, image).unfused
    assert hooked.path == "cvt.encoder.stages.0.layers.0" and hooked.reasons == ("mlp: the second linear has hooks",)
    training = fastvit_kernels.explain(model.train(), image)
    dropping = [entry for entry in training.unfused if entry.reasons == ("attention: attention dropout is active",)]
    assert [entry.path for entry in dropping] == [f"cvt.encoder.stages.2.layers.{index}" for index in range(3)]
    assert "runs unfused" in str(training) and "attention dropout is active" in str(training)


def test_own_models(image):
    pinned = fastvit_kernels.explain(create_model("cvt_13", **TINY, backend="reference").eval(), image)
    assert {decision.chosen for decision in pinned.decisions} == {"reference"}
    assert len(pinned.not_accelerated) == 11 and "pinned to the reference" in str(pinned)
    explanation = fastvit_kernels.explain(create_model("cvt_13", **TINY).eval(), image)
    assert not explanation.not_accelerated and len(explanation.decisions) == 15
    assert explanation.decisions[-1].module == "stage2.blocks.1.mlp"
    assert {decision.chosen for decision in explanation.decisions} == {usual()}


def test_a_lone_module_and_keyword_arguments():
    mlp = PointwiseMLP(8, 16).eval()
    x = torch.randn(2, 5, 8)
    explanation = fastvit_kernels.explain(mlp, x, residual=x)
    (decision,) = explanation.decisions
    assert decision.module == "" and "(model)" in str(explanation)
    assert fastvit_kernels.explain(nn.Linear(8, 8), x).decisions == []


def test_different_calls_of_one_module_are_kept_apart():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.mlp = PointwiseMLP(8, 16)

        def forward(self, x):
            own = ops.pointwise_mlp(x, self.mlp.fc1.weight, None, self.mlp.fc2.weight, None, activation="gelu")
            return self.mlp(self.mlp(own)[:, :3])

    decisions = fastvit_kernels.explain(Twice(), torch.randn(2, 5, 8)).decisions
    assert [(decision.module, decision.shape[:9]) for decision in decisions] == [
        ("", "(2, 5, 8)"),
        ("mlp", "(2, 5, 8)"),
        ("mlp", "(2, 3, 8)"),
    ]


@pytest.mark.parametrize("training", [False, True])
def test_nothing_changes(tiny_cvt, image, training):
    model = tiny_cvt(drop_rate=[0.2, 0.2, 0.2]).train(training)
    fastvit_kernels.accelerate(model)
    modes = [module.training for module in model.modules()]
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]
    generator = torch.random.get_rng_state()
    fastvit_kernels.explain(model, image)
    assert torch.equal(torch.random.get_rng_state(), generator)
    assert [module.training for module in model.modules()] == modes
    assert all(a is b and torch.equal(a, value) for a, (b, value) in zip(model.buffers(), buffers, strict=True))
    assert [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()] == hooks
    assert not torch_module._global_forward_hooks and not torch_module._global_forward_pre_hooks
    assert all(parameter.grad is None for parameter in model.parameters())


def test_an_error_of_the_model_leaves_nothing_behind(tiny_cvt):
    model = tiny_cvt().train()
    fastvit_kernels.accelerate(model)
    buffers = [buffer.clone() for buffer in model.buffers()]
    with pytest.raises(ValueError, match="pixel_values"):
        fastvit_kernels.explain(model)
    assert not torch_module._global_forward_hooks and not torch_module._global_forward_pre_hooks
    assert all(map(torch.equal, model.buffers(), buffers))


def _small_cmt():
    return create_model(
        "cmt_ti", 7, depths=(1, 1, 1, 1), embed_dims=(8, 16, 16, 16), num_heads=(1, 2, 2, 2), img_size=64
    )


def test_who_computes_the_gradients_of_a_training_model():
    model, image = _small_cmt().train(), torch.randn(2, 3, 64, 64)
    before = copy.deepcopy(model.state_dict())
    explanation = fastvit_kernels.explain(model, image, training=True)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    for decision in explanation.decisions:
        assert decision.chosen == usual() and decision.gradients in (usual(), "reference")
        recomputed = decision.gradients != decision.chosen
        assert bool(decision.gradients_rejected) == recomputed
    attention = next(decision for decision in explanation.decisions if decision.operator == "global_attention")
    assert attention.gradients == usual()
    lines = str(explanation).splitlines()
    assert "gradients" in lines[0]
    # Without a backward there is nothing to tell.
    assert "gradients" not in str(fastvit_kernels.explain(model, image)).splitlines()[0]


class _Mlp(nn.Module):
    def __init__(self, frozen=()):
        super().__init__()
        self.first, self.second = PointwiseMLP(8, 16), PointwiseMLP(8, 16)
        for name in frozen:
            self.get_submodule(name).requires_grad_(False)

    def forward(self, x):
        return {"out": self.second(self.first(x)), "note": "text"}


def test_gradients_of_frozen_parts_are_nobodys():
    x = torch.randn(2, 5, 8)
    first, second = fastvit_kernels.explain(_Mlp(["first"]), x, training=True).decisions
    assert (first.gradients, second.gradients) == ("", usual())
    text = str(fastvit_kernels.explain(_Mlp(["first"]), x, training=True))
    assert f" {usual()} " in text and " - " in text
    with fastvit_kernels.use_backend("reference"):
        first, second = fastvit_kernels.explain(_Mlp(["first"]), x, training=True).decisions
    assert (first.gradients, second.gradients) == ("", "reference") and not second.gradients_rejected
    with pytest.raises(ValueError, match="training: expected a model .* got 0 such parameters and 0 such results"):
        fastvit_kernels.explain(_Mlp(["first", "second"]), x, training=True)


@pytest.mark.skipif(not _extension.parts["cpu"].loaded, reason="built without the CPU kernels")
def test_reasons_for_recomputed_gradients_are_told(monkeypatch):
    (kernels,) = (backend for backend in operators["pointwise_mlp"].backends if backend.name == "cpu")
    monkeypatch.setattr(type(kernels), "supports_backward", lambda *arguments: ["it is Sunday"])
    explanation = fastvit_kernels.explain(_Mlp(), torch.randn(2, 5, 8), training=True)
    assert [d.gradients for d in explanation.decisions] == ["reference"] * 2
    assert [d.gradients_rejected for d in explanation.decisions] == [["it is Sunday"]] * 2
    assert "gradients by cpu: it is Sunday" in str(explanation)


def test_checkpointed_calls_are_listed_once():
    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.mlp = nn.Linear(8, 8), PointwiseMLP(8, 16)

        def forward(self, x):
            return checkpoint(self.mlp, self.stem(x), use_reentrant=False)

    (decision,) = fastvit_kernels.explain(Checkpointed(), torch.randn(2, 5, 8), training=True).decisions
    assert (decision.module, decision.gradients) == ("mlp", usual())
