"""Sizes at which a processor with AMX computes fp32 in parts: within the numerics rule, and the same bits on any number
of threads, whose tasks have other numbers of rows and of panels."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fastvit_kernels.ops.depthwise_mlp import depthwise_mlp
from fastvit_kernels.ops.global_attention import global_attention
from fastvit_kernels.ops.patch_embedding import patch_embedding
from fastvit_kernels.ops.pointwise_mlp import pointwise_mlp
from fastvit_kernels.testing import assert_within_rule
from fastvit_kernels.testing.contract.execution import assert_same_bits, thread_count


def _mlp(backend: str | None) -> Callable[..., Tensor]:
    return lambda x, w1, b1, w2, b2: pointwise_mlp(x, w1, b1, w2, b2, activation="gelu", backend=backend)


def _depthwise(backend: str | None) -> Callable[..., Tensor]:
    def call(x, w1, b1, dw, db, w2, b2):
        return depthwise_mlp(x, w1, b1, dw, db, w2, b2, grid=(13, 14), activation="gelu", backend=backend)

    return call


def _embedding(backend: str | None) -> Callable[..., Tensor]:
    return lambda x, weight, bias: patch_embedding(x, weight, bias, stride=2, backend=backend)


def _attention(backend: str | None) -> Callable[..., Tensor]:
    def call(q, k, v, weight, bias):
        return global_attention(
            q, k, v, num_heads=4, scale=0.125, proj_weight=weight, proj_bias=bias, residual=q, backend=backend
        )

    return call


MLP = ((1024, 256), (1024,), (256, 1024), (256,))
CASES = {
    "pointwise_mlp": (_mlp, (1, 203, 256), *MLP),
    "depthwise_mlp": (_depthwise, (1, 182, 256), *MLP[:2], (1024, 1, 3, 3), (1024,), *MLP[2:]),
    "patch_embedding": (_embedding, (1, 128, 26, 22), (256, 128, 2, 2), (256,)),
    "patch_embedding, few rows": (_embedding, (3, 256, 4, 4), (1000, 256, 2, 2), (1000,)),
    "global_attention": (_attention, (1, 203, 256), (1, 50, 256), (1, 50, 256), (256, 256), (256,)),
}


def _tensors(shapes: tuple[tuple[int, ...], ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(shape, generator=generator) for shape in shapes]
    # Weights of a size that keeps results near 1.
    return [x / x[0].numel() ** 0.5 if i > 0 and x.shape[0] > 100 and x.dim() > 1 else x for i, x in enumerate(inputs)]


@pytest.mark.parametrize("case", CASES)
def test_wide_products(case: str) -> None:
    make, *shapes = CASES[case]
    tensors = [x.requires_grad_() for x in _tensors(tuple(shapes))]
    found = make(None)(*tensors)
    gradients = torch.autograd.grad(found.square().sum(), tensors)
    assert_within_rule(found.detach(), make("reference"), *(x.detach() for x in tensors))

    def reference(*inputs: Tensor) -> tuple[Tensor, ...]:
        inputs = tuple(x.detach().requires_grad_() for x in inputs)
        return torch.autograd.grad(make("reference")(*inputs).square().sum(), inputs)

    assert_within_rule(gradients, reference, *(x.detach() for x in tensors))
    for threads in (1, 2, 3, 7, 16):
        with thread_count(threads):
            again = make(None)(*tensors)
            assert_same_bits([found, *gradients], [again, *torch.autograd.grad(again.square().sum(), tensors)])
