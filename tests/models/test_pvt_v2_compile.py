"""torch.compile and torch.export of PVTv2, plain and linear, and of SegFormer."""

from __future__ import annotations

import copy

import pytest
import torch
from cvt_pairs import image
from pyramid_pairs import small, small_segformer

from fastvit_kernels import accelerate
from fastvit_kernels.testing import relative_l2

MODELS = {"plain": small, "linear": lambda: small(name="pvt_v2_b2_li"), "segformer": small_segformer}


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def aot_eager(model):
    """Compiled without the code generator: the whole of tracing at a tenth of the time."""
    return torch.compile(model, fullgraph=True, backend="aot_eager")


@pytest.mark.parametrize("kind", MODELS)
def test_evaluation_in_one_graph(kind):
    model, x = MODELS[kind]().eval(), image(2, 45, 33)
    with torch.no_grad():
        expected = model(x)
        assert relative_l2(aot_eager(model)(x), expected) <= 1e-6
        accelerate(model, inference=True)
        assert relative_l2(aot_eager(model)(x), expected) <= 1e-5


def test_training_in_one_graph():
    model = small_segformer().train()
    compiled = copy.deepcopy(model)
    x = image(2, 45, 33)
    for run in (model, aot_eager(compiled)):
        run(x).square().sum().backward()
    scale = max(float(p.grad.norm()) for p in model.parameters())
    for (name, a), b in zip(compiled.named_parameters(), model.parameters(), strict=True):
        assert float((a.grad - b.grad).norm()) <= 1e-5 * float(b.grad.norm()) + 1e-6 * scale, name


@pytest.mark.parametrize("kind", MODELS)
def test_export_is_plain_pytorch(kind):
    model, x = MODELS[kind]().eval(), image(2, 45, 33)
    exported = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},))
    assert not [node.target for node in exported.graph.nodes if "fastvit" in str(node.target)]
    for batch in (2, 3):
        x = image(batch, 45, 33)
        with torch.no_grad():
            assert relative_l2(exported.module()(x), model(x)) <= 1e-5
