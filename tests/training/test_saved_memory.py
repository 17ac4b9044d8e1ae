"""What the MLPs keep for their backward, in units of their input: little with fused operators, a lot without."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from fastvit_kernels import nn as fused
from fastvit_kernels import use_recompute
from fastvit_kernels.bench import step_memory
from fastvit_kernels.nn import LayerNorm

# With recomputation on.
MOST = 1.3
# By default those with batch statistics or a norm behind them keep maps.
MOST_OF_EAGER = 0.5
# A hidden map has four to eight times the input's channels, and autograd keeps several of them.
LEAST_OF_EAGER = 14

Call = Callable[[nn.Module, Tensor], Tensor]


def _mix_ffn() -> tuple[nn.Module, Tensor, Call]:
    """Of PVTv2-B1, stage 1."""
    norm = LayerNorm(64, eps=1e-6)
    return fused.MixFFN(64, 512), torch.randn(1, 56 * 56, 64), lambda m, x: m(x, 56, 56, norm=norm, residual=x)


def _irffn() -> tuple[nn.Module, Tensor, Call]:
    """Of CMT-XS, stage 1."""
    norm = LayerNorm(52, eps=1e-6)
    return fused.IRFFN(52, 196), torch.randn(1, 48 * 48, 52), lambda m, x: m(x, 48, 48, norm=norm, residual=x)


def _daff() -> tuple[nn.Module, Tensor, Call]:
    """Of DHVT-Tiny for ImageNet."""
    norm = LayerNorm(192, eps=1e-6)
    return fused.DAFF(192, 768, 192), torch.randn(1, 197, 192), lambda m, x: m(x, norm=norm, residual=x)


def _hat_mlp() -> tuple[nn.Module, Tensor, Call]:
    """Of HAT-Net-Tiny, stage 1."""
    x = torch.randn(1, 48, 56, 56).contiguous(memory_format=torch.channels_last)
    return fused.HatMLP(48, 384), x, lambda m, x: m(x, residual=x)


MLPS = {"MixFFN": _mix_ffn, "IRFFN": _irffn, "DAFF": _daff, "HatMLP": _hat_mlp}
KEEPING = ("IRFFN", "DAFF", "HatMLP")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", MLPS)
def test_saved_for_backward(name: str, dtype: torch.dtype) -> None:
    module, x, call = MLPS[name]()
    module.train()
    x = x.to(dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.bfloat16):
        with use_recompute(True):
            least = _kept(module, x, call) / x.nbytes
        ours = _kept(module, x, call) / x.nbytes
        module.backend = "reference"
        plain = _kept(module, x, call) / x.nbytes
    assert 1 <= least <= MOST and plain >= LEAST_OF_EAGER, (least, plain)
    if name in KEEPING:
        assert least < ours <= MOST_OF_EAGER * plain, (least, ours, plain)
    else:
        assert ours == least


def _kept(module: nn.Module, x: Tensor, call: Call) -> int:
    """Bytes of the storages that autograd keeps, the input among them, without parameters."""
    x = x.clone().requires_grad_()
    return step_memory.saved(lambda: call(module, x), (*module.parameters(), *module.buffers()))
