"""Calls of the registered operators that the public functions would refuse: exceptions, never a damaged process."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from fastvit_kernels.testing import inputs
from fastvit_kernels.testing.calls import as_list
from fastvit_kernels.testing.raw import raw_call

HUGE = (2**31, 2**61, 2**62, 2**63 - 1, -1, -(2**63))
# The integers among the static arguments, by position; a list holds one per branch.
INTEGERS = {
    "conv_projection": {"height": 3, "width": 4, "prefix": 5, "stride": 6, "padding": 7},
    "depthwise_conv": {"height": 3, "width": 4, "stride": 5, "padding": 6},
    "depthwise_mlp": {"height": 9, "width": 10, "prefix": 11},
    "global_attention": {"num_heads": 0},
    "head_tokens": {"num_heads": 0},
    "local_attention": {"height": 2, "width": 3, "window": 4, "num_heads": 5},
    "merge_head_tokens": {"num_heads": 0},
    "patch_embedding": {"stride": 2, "padding": 3},
    "pooled_projection": {"height": 2, "width": 3, "kernel": 4},
}


def _operator(name):
    return getattr(torch.ops.fastvit, name).default


def _native_backward(name):
    packet = getattr(torch.ops.fastvit, f"{name}_backward")
    return [packet.native] if "native" in packet.overloads() else []


@pytest.mark.parametrize(("name", "argument"), [(name, key) for name, keys in INTEGERS.items() for key in keys])
@pytest.mark.parametrize("value", HUGE)
def test_integers_that_overflow(name, argument, value):
    tensors, static = raw_call(inputs.tagged(inputs.CASES[name], "smallest")[0].call())
    arguments = list(static)
    at = INTEGERS[name][argument]
    grads = [torch.ones_like(output) for output in as_list(_operator(name)(tensors, None, *static))]
    needs = [t is not None for t in tensors]
    for wrong in [[value, *arguments[at][1:]]] if isinstance(arguments[at], list) else [value]:
        changed = [*arguments[:at], wrong, *arguments[at + 1 :]]
        with pytest.raises((RuntimeError, ValueError)):
            _operator(name)(tensors, None, *changed)
        for backward in _native_backward(name):
            with pytest.raises((RuntimeError, ValueError)):
                backward(grads, tensors, needs, *changed)


def test_a_grid_whose_product_wraps():
    tensors, static = raw_call(inputs.tagged(inputs.CONV_PROJECTION, "smallest")[0].call())
    wrong = static._replace(height=2**32, width=2**32, num_prefix_tokens=tensors[0].shape[1])
    with pytest.raises(RuntimeError, match="grid: does not make the tokens of x"):
        torch.ops.fastvit.conv_projection.default(tensors, None, *wrong)


@pytest.mark.parametrize("name", inputs.CASES)
def test_weights_of_other_dtypes_and_devices(name):
    tensors, static = raw_call(inputs.tagged(inputs.CASES[name], "smallest")[0].call())
    for index, tensor in enumerate(tensors):
        if tensor is None:
            continue
        for wrong in (tensor.to(torch.int8), tensor.bool(), tensor.double(), tensor.to("meta"), tensor[..., :0]):
            with pytest.raises((RuntimeError, ValueError, TypeError)):
                _operator(name)([*tensors[:index], wrong, *tensors[index + 1 :]], None, *static)


def test_neighbourhoods_beside_the_map_write_nothing_else():
    """Under an allocator that checks what stands behind its blocks."""
    program = """
import torch
from fastvit_kernels import ops
for kernel, padding in ((1, 16), (1, 40), (3, 64), (3, 500), (1, 100)):
    for channels in (3, 64):
        x, weight = torch.randn(1, channels, 8, 8), torch.randn(8, channels, kernel, kernel)
        for _ in range(20):
            ops.patch_embedding(x, weight, None, stride=padding, padding=padding, backend="cpu")
"""
    environment = {**os.environ, "MALLOC_CHECK_": "3", "MALLOC_PERTURB_": "85"}
    subprocess.run([sys.executable, "-c", program], check=True, env=environment, timeout=300)


@pytest.mark.parametrize(
    ("name", "bias", "weight", "message"),
    [
        ("local_attention", 7, 6, "qkv_bias"),
        ("local_attention", 10, 9, "proj_bias"),
        ("global_attention", 8, 7, "query_bias"),
        ("global_attention", 4, 3, "proj_bias"),
    ],
)
def test_biases_of_projections_that_are_not_there(name, bias, weight, message):
    """Ignoring one would be an answer to another question."""
    options = {"form": "packed", "norm": None} if name == "local_attention" else {}
    make = getattr(inputs, f"{name}_case")
    tensors, static = raw_call(make("bare", proj=False, residual=False, **options).call())
    assert tensors[bias] is None and tensors[weight] is None
    _operator(name)(tensors, None, *static)
    tensors[bias] = torch.zeros(48)
    with pytest.raises(RuntimeError, match=f"{message}: expected the weight of its projection"):
        _operator(name)(tensors, None, *static)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_projections_without_rows_or_columns(dtype):
    """Their memory is null, which must not pass for an absent weight."""
    x, k, packed = torch.randn(1, 16, 8), torch.randn(1, 4, 16), torch.randn(24, 8)
    nothing, empty = torch.randn(0, 8), torch.randn(1, 16, 0)
    window = ("none", 0.0, 4, 4, 4, 1, 1.0, "none", False, dtype)
    everywhere = (1, 1.0, "none", 0.0, False, False, dtype)
    local, whole = torch.ops.fastvit.local_attention.default, torch.ops.fastvit.global_attention.default
    calls = [
        (local, [x, *[None] * 5, packed, None, None, nothing, None, None], window),
        (local, [empty, *[None] * 5, torch.randn(24, 0), *[None] * 5], window),
        (whole, [x, k, None, nothing, *[None] * 8], everywhere),
        (whole, [empty, k, *[None] * 5, torch.randn(8, 0), *[None] * 4], everywhere),
    ]
    for function, tensors, static in calls:
        with pytest.raises(RuntimeError, match="expected at least one"):
            function([None if t is None else t.to(dtype) for t in tensors], None, *static)
