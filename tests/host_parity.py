"""A model of another library and its accelerated copy: the same numbers, gradients, random numbers and state."""

from __future__ import annotations

import copy
from contextlib import contextmanager

import torch

import fastvit_kernels
from fastvit_kernels.testing import relative_l2

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}


def image(*size, dtype=torch.float64, seed=1):
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def randomize(model, seed=0):
    """The model in evaluation mode, with weights so large that every layer matters."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            scale = 0.3 if parameter.ndim < 2 else 1.5 / parameter[0].numel() ** 0.5
            parameter.normal_(0.0, scale, generator=generator)
        for name, buffer in model.named_buffers():
            if name.endswith("running_var"):
                buffer.uniform_(0.5, 1.5, generator=generator)
            elif name.endswith("running_mean"):
                buffer.normal_(0.0, 0.3, generator=generator)
    return model.eval()


def accelerated(model, inference=False):
    """An accelerated copy, and the report."""
    fused = copy.deepcopy(model)
    return fused, fastvit_kernels.accelerate(fused, inference=inference)


def logits(model, x):
    output = model(x)
    return output if isinstance(output, torch.Tensor) else output.logits


def assert_same(stock, fused, *inputs):
    with torch.no_grad():
        for x in inputs:
            expected, found = logits(stock, x), logits(fused, x)
            assert found.dtype == expected.dtype and found.shape == expected.shape
            assert relative_l2(found, expected) <= TOLERANCE[x.dtype]


def training_step(model, x, seed=5):
    """Logits, every gradient and every buffer after one forward and backward, in the mode the model is in."""
    torch.manual_seed(seed)
    model.zero_grad()
    x = x.clone().requires_grad_()
    y = logits(model, x)
    (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum().backward()
    gradients = {"input": x.grad, **{name: p.grad for name, p in model.named_parameters()}}
    return {"logits": y.detach(), **gradients, **dict(model.named_buffers())}


def assert_same_step(stock, fused, x, tolerance=1e-11):
    expected, found = training_step(stock, x), training_step(fused, x)
    assert expected.keys() == found.keys()
    # Some gradients are zero but for rounding (the bias of the keys): they are measured against the largest one.
    largest = max(float(p.grad.norm()) for p in stock.parameters())
    for name, value in expected.items():
        difference = float((found[name] - value).double().norm())
        assert difference <= tolerance * max(float(value.double().norm()), largest), name


def assert_drops_the_same(make, x):
    """`make()` gives a model with random drops: two steps of it differ, those of the accelerated model do not."""
    stock = make().double().train()
    assert relative_l2(training_step(stock, x, seed=6)["logits"], training_step(stock, x)["logits"]) > 1e-3
    fused, report = accelerated(stock)
    assert report
    assert_same_step(stock, fused, x)


def assert_autocast_errs_no_more(stock, x, inference=True):
    """Of an fp32 model under autocast to bf16: at most twice its error, no rounding besides, in the same dtype."""
    fused, _ = accelerated(stock, inference)
    with torch.no_grad():
        exact = logits(copy.deepcopy(stock).double(), x.double())
        with torch.autocast("cpu", torch.bfloat16):
            expected, found = logits(stock, x), logits(fused, x)
    assert found.dtype == expected.dtype
    assert relative_l2(found, exact) <= 2 * relative_l2(expected, exact)


def snapshot(model):
    """What `restore` must put back: classes, attributes, and the identity of all that modules hold."""
    found = {}
    for path, module in model.named_modules():
        attributes = {
            key: (id(value), {name: id(item) for name, item in value.items()} if isinstance(value, dict) else None)
            for key, value in module.__dict__.items()
        }
        found[path] = (type(module), id(module), attributes)
    return found


def assert_reversible(model, x):
    """Repeated acceleration changes nothing, `restore` brings back the very model, and no key ever changes."""
    with torch.no_grad():
        # Called first: timm's models keep tables that they make at their first call.
        expected = logits(model, x)
        before, names = snapshot(model), list(model.state_dict())
        first = fastvit_kernels.accelerate(model, inference=True)
        once = snapshot(model)
        again = fastvit_kernels.accelerate(model, inference=True)
        logits(model, x)
        assert first and not again and snapshot(model) == once and list(model.state_dict()) == names
        restored = fastvit_kernels.restore(model)
        assert [entry.path for entry in restored.replaced] == [entry.path for entry in first.replaced]
        assert snapshot(model) == before and torch.equal(logits(model, x), expected)


def is_embedding(path):
    """Whether a module is the convolution in front of a stage, by the names that hosts give it."""
    return "embed" in path or path.endswith("downsample")


def is_block(path):
    """Whether a path is neither a patch embedding's nor a positional encoding's."""
    return not is_embedding(path) and not path.startswith("pos_block")


def blocks(report):
    """The paths of the blocks that were replaced."""
    return [entry.path for entry in report.replaced if is_block(entry.path)]


def calls_in(explanation):
    """The operators that ran in blocks, by module path."""
    calls = {}
    for decision in explanation.decisions:
        if is_block(decision.module):
            calls.setdefault(decision.module, []).append(decision.operator)
    return calls


def operator_calls(model, x):
    return calls_in(fastvit_kernels.explain(model, x))


def assert_embeddings_fuse(stock, x, paths):
    """The patch embeddings at these paths run on the operator, unless something in them has hooks."""
    fused, report = accelerated(stock)
    assert [entry.path for entry in report.replaced if is_embedding(entry.path)] == paths
    found = {d.module: d.operator for d in fastvit_kernels.explain(fused, x).decisions if d.module in paths}
    assert found == dict.fromkeys(paths, "patch_embedding")
    for model in (stock, fused):
        model.get_submodule(paths[1]).proj.register_forward_hook(lambda module, args, output: 2 * output)
    assert_same(stock, fused, x)
    (remark,) = fastvit_kernels.explain(fused, x).unfused
    assert remark.path == paths[1] and remark.reasons == ("the convolution has hooks",)


def assert_repeats(model, x):
    """Every accelerated block of the packed model records its calls, and repeats them with the same result."""
    fused, report = accelerated(model, inference=True)
    states = [fused.get_submodule(path).__dict__["_fastvit"] for path in blocks(report)]
    with torch.no_grad():
        results = [logits(fused, x) for _ in range(4)]
        assert all(state.repeater.recorded == 1 for state in states)
        assert all(torch.equal(result, results[0]) for result in results)
        for parameter in (*model.parameters(), *fused.parameters()):
            parameter.mul_(0.9)
    assert_same(model, fused, x)


@contextmanager
def planted(monkeypatch, module, function, **arguments):
    """`function` of `module` gets these in place of what it is given: a mistake that a test must see."""
    original = getattr(module, function)

    def mistaken(*args, **kwargs):
        return original(*args, **kwargs | {key: arguments[key] for key in arguments if kwargs.get(key) is not None})

    with monkeypatch.context() as patch:
        patch.setattr(module, function, mistaken)
        yield
