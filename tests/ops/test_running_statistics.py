"""Running statistics of batch norms: what the C++ update does is what PyTorch's does."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from fastvit_kernels.nn import IRFFN
from fastvit_kernels.ops import BatchNorm, depthwise_conv
from fastvit_kernels.ops.batch_norm import BatchOf, update_running_statistics

update = torch.ops.fastvit.update_running_statistics.default


def batches(dtype: torch.dtype = torch.float32) -> list[BatchOf]:
    torch.manual_seed(0)
    return [
        BatchOf(
            BatchNorm(None, None, torch.randn(n).to(dtype), torch.rand(n).to(dtype), 1e-5, True, momentum), *moments
        )
        for n, momentum in ((1, 0.1), (17, 0.5), (300, 0.9), (64, 1.0), (5, 0.0))
        for moments in [(torch.randn(n), torch.rand(n), 7 * n)]
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_pytorch_to_the_bit(dtype: torch.dtype) -> None:
    ours, wanted = batches(dtype), batches(dtype)
    update_running_statistics(ours, by_kernel=True)
    update_running_statistics(wanted)
    for a, b in zip(ours, wanted, strict=True):
        assert torch.equal(a.bn.running_mean, b.bn.running_mean) and torch.equal(a.bn.running_var, b.bn.running_var)


def test_writes_are_counted() -> None:
    """Who has saved a running mean for a gradient learns that it has changed."""
    (batch, *_) = batches()
    versions = [t._version for t in batch.bn[2:4]]
    update_running_statistics([batch], by_kernel=True)
    assert [t._version for t in batch.bn[2:4]] == [version + 1 for version in versions]


def test_untracked_statistics_and_inference_tensors() -> None:
    update_running_statistics(
        [BatchOf(BatchNorm(None, None, None, None, training=True), torch.ones(3), torch.ones(3), 4)], True
    )
    with torch.inference_mode():
        (batch, *_) = batches()
        update_running_statistics([batch], by_kernel=True)
        assert torch.isfinite(batch.bn.running_mean).all()


def test_fake_tensors_pass() -> None:
    with FakeTensorMode():
        module = IRFFN(8, 16).train()
        assert module(torch.randn(2, 12, 8), 3, 4).shape == (2, 12, 8)


def wrong(t: Tensor) -> list[Tensor]:
    return [t[:-1].contiguous(), t.double(), t.bfloat16(), t.repeat(2)[::2], t.to("meta"), t[None]]


def test_hostile_calls_are_refused() -> None:
    running, found = [torch.zeros(6), torch.ones(6)], [torch.ones(6), torch.ones(6)]
    before = [t.clone() for t in running]
    calls = [(running[:1], found, [0.1], [1.0]), (running, found[:1], [0.1], [1.0]), (running, found, [], [1.0])]
    calls += [(running, found, [0.1], []), (running, found, [0.1, 0.2], [1.0, 1.0])]
    calls += [([running[0], other], found, [0.1], [1.0]) for other in wrong(running[1])]
    calls += [(running, [found[0], other], [0.1], [1.0]) for other in wrong(found[1])]
    for arguments in calls:
        with pytest.raises((RuntimeError, ValueError)):
            update(*arguments)
    assert all(torch.equal(a, b) for a, b in zip(running, before, strict=True))


def test_a_step_moves_them_as_the_stock_module_does() -> None:
    torch.manual_seed(0)
    conv, bn = torch.nn.Conv2d(8, 8, 3, padding=1, groups=8), torch.nn.BatchNorm2d(8)
    mean, var = bn.running_mean.clone(), bn.running_var.clone()
    x = torch.randn(2, 20, 8)
    norm = BatchNorm(bn.weight, bn.bias, mean, var, bn.eps, True, 0.1)
    depthwise_conv(x, conv.weight, conv.bias, grid=(4, 5), padding=1, bn=norm, backend="cpu")
    bn(conv(x.mT.unflatten(2, (4, 5))))
    torch.testing.assert_close(mean, bn.running_mean)
    torch.testing.assert_close(var, bn.running_var)
