"""torch.compile and torch.export of whole HAT-Nets."""

from __future__ import annotations

import copy

import pytest
import torch
from cvt_pairs import image
from hat_net_pairs import small

from fastvit_kernels import accelerate
from fastvit_kernels.testing import relative_l2


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def aot_eager(model):
    """Compiled without the code generator: the whole of tracing at a tenth of the time."""
    return torch.compile(model, fullgraph=True, backend="aot_eager")


@pytest.mark.parametrize("prepared", [False, True], ids=["as it is", "packed weights"])
def test_evaluation_in_one_graph(prepared):
    model = small().eval()
    if prepared:
        accelerate(model, inference=True)
    x = image(2, 70, 45)
    with torch.no_grad():
        expected = model(x)
        assert relative_l2(aot_eager(model)(x), expected) <= 1e-6


def test_training_in_one_graph():
    model = small(classifier_drop_rate=0.0).train()
    compiled = copy.deepcopy(model)
    x = image()
    for module, run in ((model, model), (compiled, aot_eager(compiled))):
        run(x).square().sum().backward()
        assert all((p.grad is None) == (".proj_norm." in name) for name, p in module.named_parameters())
    scale = max(float(p.grad.norm()) for p in model.parameters() if p.grad is not None)
    for (name, a), b in zip(compiled.named_parameters(), model.parameters(), strict=True):
        if b.grad is not None:
            assert float((a.grad - b.grad).norm()) <= 1e-5 * float(b.grad.norm()) + 1e-6 * scale, name


def test_export_is_plain_pytorch():
    model = small().eval()
    exported = torch.export.export(model, (image(),), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},))
    assert not [node.target for node in exported.graph.nodes if "fastvit" in str(node.target)]
    for batch in (2, 3):
        x = image(batch)
        with torch.no_grad():
            assert relative_l2(exported.module()(x), model(x)) <= 1e-5
