"""What CUDA graphs ask of the launch paths: nothing waits for the device, no size depends on what tensors hold.

Every path runs on tensors without memory, from which nothing can be read. The capture itself takes a GPU: see
`tests/cuda/test_device.py`.
"""

from __future__ import annotations

import re
from contextlib import contextmanager, nullcontext
from importlib import import_module
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from fastvit_kernels import accelerate, use_backend
from fastvit_kernels.models import create_model
from fastvit_kernels.ops import library, triton_support
from fastvit_kernels.testing.inputs import BF16_FP32, CASES
from fastvit_kernels.testing.raw import raw_call

SOURCES = Path(__file__).parents[2] / "csrc" / "cuda"
# They set up or ask after a launch, and do not wait for it.
HARMLESS = {
    *("cudaFuncSetAttribute", "cudaGetErrorString", "cudaGetLastError"),
    *("cudaGetDevice", "cudaDeviceGetAttribute"),
}
TINY = {
    "cvt_13": {"depths": (1, 1, 2)},
    "hat_net_tiny": {"depths": (1, 1, 1, 1)},
    "cmt_ti": {"depths": (1, 1, 1, 1)},
    "pvt_v2_b0": {"depths": (1, 1, 1, 1)},
}


class OnDevice(TorchDispatchMode):
    """Nothing but tensors without memory takes part: one of the host would have to be copied, which waits."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for leaf in pytree.tree_leaves((args, kwargs, out)):
            if isinstance(leaf, torch.Tensor) and leaf.device.type != "meta":
                raise AssertionError(f"{func}: a tensor on the {leaf.device.type}")
        return out


@contextmanager
def launching():
    """Launchers run as on a GPU but for the launches, which are listed."""
    launched = []

    def submit(kernel, grid, args, options):
        assert all(type(n) is int and n > 0 for n in grid)
        launched.append(kernel)

    with (
        mock.patch.object(triton_support, "submit", submit),
        mock.patch.object(triton_support, "architecture", lambda device: "sm_90"),
        mock.patch.object(triton_support, "_guard", lambda device: nullcontext()),
        OnDevice(),
        torch.no_grad(),
    ):
        yield launched


def on_meta(tensors):
    return [
        None if t is None else torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta") for t in tensors
    ]


def triton_backend(operator):
    return next((backend for backend in library.operators[operator].backends if backend.name == "triton"), None)


WITH_TRITON = [operator for operator in CASES if triton_backend(operator) is not None]


def calls(operator):
    """Tensors without memory and static arguments of every case that the kernels take."""
    for case in CASES[operator]:
        tensors, static = raw_call(case.call(BF16_FP32))
        if not triton_backend(operator).supports(tensors, static):
            yield case, on_meta(tensors), static


@pytest.mark.parametrize("operator", WITH_TRITON)
def test_forward(operator):
    bridge = import_module(f"fastvit_kernels.ops.{operator}.triton")
    for case, tensors, static in calls(operator):
        with launching() as launched:
            bridge.launch(tensors, static)
        assert launched or "empty" in case.tags, case


@pytest.mark.parametrize("operator", WITH_TRITON)
def test_batch_statistics(operator):
    bridge = import_module(f"fastvit_kernels.ops.{operator}.triton")
    launch = getattr(bridge, "launch_statistics", None)
    for case, tensors, static in calls(operator) if launch is not None else ():
        if "empty" not in case.tags:
            with launching() as launched:
                launch(tensors, static)
            assert launched, case


@pytest.mark.parametrize("operator", WITH_TRITON)
def test_gradients(operator):
    backend, bridge = triton_backend(operator), import_module(f"fastvit_kernels.ops.{operator}.triton")
    if not hasattr(bridge, "launch_backward"):
        assert not hasattr(backend, "run_backward")
        return
    for case, tensors, static in calls(operator):
        grads = list(library.operators[operator].fake(tensors, static))
        needs = [t is not None for t in tensors]
        if backend.supports_backward(grads, tensors, needs, static):
            continue
        with launching() as launched:
            bridge.launch_backward(grads, tensors, needs, static)
        assert launched or "empty" in case.tags, case


@pytest.mark.parametrize("name", TINY)
def test_models(name):
    """What a model does between its operators, forward and backward, with autograd and dispatch."""
    with torch.device("meta"):
        model = create_model(name, num_classes=5, **TINY[name]).train()
        side = 160 if name == "cmt_ti" else 224
        image = torch.empty(2, 3, side, side)
    accelerate(model)
    operators = set()

    class Listening(OnDevice):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            operators.add(str(func))
            return super().__torch_dispatch__(func, types, args, kwargs)

    with mock.patch.object(triton_support, "machine_problem", lambda device: None), use_backend("triton"), Listening():
        model(image).sum().backward()
    assert any(".triton" in operator for operator in operators)
    assert any("_backward.triton" in operator for operator in operators)


# What a launch path must not do, with a tensor on the device.
MISTAKES = {
    "item": lambda x: x.sum().item(),
    "float": lambda x: float(x.sum()),
    "condition": lambda x: 1 if x.sum() > 0 else 2,
    "cpu": lambda x: x.cpu(),
    "tolist": lambda x: x.tolist(),
    "numpy": lambda x: x.numpy(),
    "nonzero": lambda x: x.nonzero(),
    "mask": lambda x: x[x > 0],
    "unique": lambda x: torch.unique(x),
    "repeat_interleave": lambda x: torch.repeat_interleave(x.long()),
    "from the host": lambda x: torch.tensor([1.0, 2.0]).to(x.device) + x[:2],
    "host scalar": lambda x: x * torch.ones(()),
    "equal": lambda x: torch.equal(x, x.clone()),
    "allclose": lambda x: torch.allclose(x, x + 1),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_each_mistake_is_found(name):
    x = torch.empty(4, device="meta")
    with pytest.raises((AssertionError, RuntimeError, NotImplementedError, TypeError)), launching():
        MISTAKES[name](x)


def test_cuda_sources_call_nothing_that_waits_or_allocates():
    """Outputs and scratch come from PyTorch's allocator, which a graph keeps; all work goes to its stream."""
    files = [path for path in SOURCES.iterdir() if path.suffix in (".cu", ".cpp", ".h", ".cuh")]
    code = "\n".join(re.sub(r"//.*", "", path.read_text()) for path in files)
    assert set(re.findall(r"\b(cuda[A-Z]\w*)\s*\(", code)) <= HARMLESS
    assert "cudaGetLastError" in code
    for word in ("new_pinned", ".item(", "cudaMemcpy", "cudaMalloc", "printf("):
        assert word not in code
