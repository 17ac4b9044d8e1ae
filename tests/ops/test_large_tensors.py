"""Tensors of more than 2^31 values: what the kernels make of the last sample, whose offsets 32 bits do not hold.

Nobody has so much memory here, nor so much time. The memory is asked for and hardly touched, which the operating system
gives; and of the programs of a launch the interpreter runs the first ones, which prepare something for the others, and
those of the last sample.
"""

from __future__ import annotations

import builtins
from contextlib import contextmanager
from importlib import import_module
from unittest import mock

import pytest
import torch

from fastvit_kernels.ops import library
from fastvit_kernels.testing import assert_within_rule, inputs
from fastvit_kernels.testing.calls import Call
from fastvit_kernels.testing.inputs import BF16
from fastvit_kernels.testing.raw import raw_call

LARGEST = 2**31
OPTIONS = {
    # Three launches in one: the last sample of each is at the end of a third.
    "conv_projection": {"stride": (1, 1, 1)},
    "depthwise_conv": {},
    "depthwise_mlp": {"norm": "layer"},
    "global_attention": {},
    "head_tokens": {},
    "local_attention": {"channels": 16, "norm": "layer"},
    "merge_head_tokens": {},
    "patch_embedding": {},
    "pointwise_mlp": {},
    "pooled_projection": {},
}


def few(*arguments: int) -> list[int] | range:
    """Of a launch of many programs, those that this is about."""
    programs = builtins.range(*arguments)
    count = len(programs)
    if count <= 1000:
        return programs
    ends = [range(at - 32, min(at + 8, count)) for at in (count // 3, 2 * count // 3, count)]
    return sorted({*range(8), *(index for end in ends for index in end)})


@contextmanager
def few_programs():
    from triton.runtime import interpreter

    executor = interpreter.GridExecutor
    with (
        mock.patch.object(interpreter, "range", few, create=True),
        # They would copy all of it.
        mock.patch.object(executor, "_init_args_hst", lambda self, args, kwargs: (args, kwargs)),
        mock.patch.object(executor, "_restore_args_dev", lambda *arguments: None),
    ):
        yield


def call_of(operator: str, batch: int, **options: object) -> Call:
    size = {"leading": (batch, 9)} if operator == "pointwise_mlp" else {"batch": batch}
    return getattr(inputs, f"{operator}_case")("case", **size, **OPTIONS[operator], **options).call(BF16)


def enlarge(operator: str, **options: object):
    """A call of one sample; its tensors, those of it as the last sample of many; and which these are."""
    (tensors, static), (others, _) = (raw_call(call_of(operator, batch, **options)) for batch in (1, 2))
    per_sample = [t is not None and t.shape != o.shape for t, o in zip(tensors, others, strict=True)]
    assert per_sample[0]
    batch = LARGEST // tensors[0].numel() + 2
    large = [last_of(batch, t) if many else t for t, many in zip(tensors, per_sample, strict=True)]
    return tensors, static, large, per_sample


def last_of(batch: int, sample: torch.Tensor) -> torch.Tensor:
    memory = torch.empty(batch * sample.numel(), dtype=sample.dtype)
    large = memory.as_strided((batch, *sample.shape[1:]), (sample.numel(), *sample.stride()[1:]))
    large[-1] = sample[0]
    return large


# Between the first samples and the last one memory holds anything.
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("operator", OPTIONS)
def test_the_last_sample(operator: str) -> None:
    tensors, static, large, _ = enlarge(operator)
    assert large[0].numel() > LARGEST
    reference = library.operators[operator].reference
    exact, low = reference(*raw_call(call_of(operator, 1).fp64())), reference(tensors, static)
    bridge = import_module(f"fastvit_kernels.ops.{operator}.triton")
    with few_programs():
        found = bridge.launch(library.dense(large, library.operators[operator].triton_any_layout), static)
    kept = [index for index, output in enumerate(low) if output.numel()]
    assert kept and all(found[index].numel() > LARGEST // 8 for index in kept)
    assert_within_rule([found[i][-1:] for i in kept], ([exact[i] for i in kept], [low[i] for i in kept]))


def test_gradients_of_the_last_queries_keys_and_values() -> None:
    """Of weights there are none: they would be sums over all samples."""
    operator, options = "global_attention", {"residual": False}
    tensors, static, large, per_sample = enlarge(operator, **options)
    assert large[0].numel() > LARGEST
    reference, slopes = library.operators[operator].reference, []

    def gradients(tensors, static):
        leaves = [t.detach().requires_grad_() if many else t for t, many in zip(tensors, per_sample, strict=True)]
        result = reference(leaves, static)[0]
        if not slopes:
            slopes.append(torch.randn(result.shape, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16))
        return torch.autograd.grad(
            result, [t for t in leaves if t is not None and t.requires_grad], slopes[0].to(result)
        )

    exact, low = gradients(*raw_call(call_of(operator, 1, **options).fp64())), gradients(tensors, static)
    bridge = import_module(f"fastvit_kernels.ops.{operator}.triton")
    outputs = library.operators[operator].fake([t if t is None else t.to("meta") for t in large], static)
    grads = [last_of(large[0].shape[0], slopes[0]), *(torch.empty(o.shape) for o in outputs[1:])]
    with few_programs():
        found = bridge.launch_backward(grads, library.dense(large), per_sample, static)
    assert_within_rule([gradient[-1:] for gradient in found], (list(exact), list(low)))
