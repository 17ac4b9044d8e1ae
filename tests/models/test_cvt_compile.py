"""torch.compile and torch.export of whole models."""

from __future__ import annotations

import copy

import pytest
import torch
from cvt_pairs import image
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from fastvit_kernels.testing import relative_l2


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def aot_eager(model, **options):
    """Compiled without the code generator: the whole of tracing at a tenth of the time."""
    return torch.compile(model, fullgraph=True, backend="aot_eager", **options)


@pytest.mark.parametrize("prepared", [False, True], ids=["as it is", "packed weights"])
def test_evaluation_in_one_graph(small, prepared):
    model = small().eval()
    for module in model.modules():
        if prepared and hasattr(module, "prepare_inference"):
            module.prepare_inference(True)
    x = image()
    with torch.no_grad():
        expected = model(x)
        assert relative_l2(torch.compile(model, fullgraph=True)(x), expected) <= 1e-6


def test_training_in_one_graph(small):
    model = small(drop_path_rate=0.0).train()
    compiled = copy.deepcopy(model)
    run = aot_eager(compiled)
    x = image()
    for _ in range(2):
        for module, forward in ((model, model), (compiled, run)):
            module.zero_grad()
            forward(x).square().sum().backward()
    scale = max(float(p.grad.norm()) for p in model.parameters())
    for (name, a), b in zip(compiled.named_parameters(), model.parameters(), strict=True):
        assert float((a.grad - b.grad).norm()) <= 1e-5 * float(b.grad.norm()) + 1e-6 * scale, name
    for (name, a), b in zip(compiled.named_buffers(), model.buffers(), strict=True):
        assert relative_l2(a, b) <= 1e-6, name


def test_attention_dropout_in_one_graph(small):
    model = small(attn_drop_rate=0.5, drop_rate=0.1).train()
    assert bool(aot_eager(model)(image()).isfinite().all())


def test_sizes_that_vary_compile_once(small):
    model = small().eval()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter, dynamic=True)
    with torch.no_grad():
        compiled(image())
        compilations = counter.frame_count
        for batch, h, w in ((3, 80, 96), (5, 70, 45)):
            x = image(batch, h, w)
            assert relative_l2(compiled(x), model(x)) <= 1e-6
    assert counter.frame_count == compilations > 0


def test_hooks_are_seen_in_the_graph(small):
    model = small().eval()
    x = image()
    with torch.no_grad():
        before = model(x)
        model.stage1.blocks[0].mlp.fc1.register_forward_hook(lambda module, args, out: 2 * out)
        expected = model(x)
        assert relative_l2(expected, before) > 1e-2
        assert relative_l2(aot_eager(model)(x), expected) <= 1e-6


@pytest.mark.parametrize("features_only", [False, True], ids=["classifier", "features"])
def test_export_is_plain_pytorch(small, features_only):
    model = small(features_only=features_only).eval()
    x = image()
    exported = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},))
    assert not [node.target for node in exported.graph.nodes if "fastvit" in str(node.target)]
    for batch in (2, 3):
        x = image(batch)
        with torch.no_grad():
            found, expected = exported.module()(x), model(x)
        if not features_only:
            found, expected = [found], [expected]
        for a, b in zip(found, expected, strict=True):
            assert relative_l2(a, b) <= 1e-5


def test_export_of_a_model_in_training(small):
    model = small().train()
    exported = torch.export.export(model, (image(),))
    assert isinstance(exported.module(), nn.Module)
