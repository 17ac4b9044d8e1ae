"""The yardsticks of accelerated models tell good from bad."""

from __future__ import annotations

import copy

import host_parity
import pytest
import torch
from torch import nn


class Widened(nn.Module):
    """Gives the results of bf16 out in fp32, where an error can be scaled without being rounded again."""

    def __init__(self, linear):
        super().__init__()
        self.linear = linear

    def forward(self, x):
        out = self.linear(x)
        return out.float() if out.dtype is torch.bfloat16 else out


class OffBy(nn.Module):
    """A linear whose results err `factor` times as much as those of bf16 do."""

    def __init__(self, linear, factor):
        super().__init__()
        self.linear, self.factor = linear, factor

    def forward(self, x):
        low = self.linear(x)
        with torch.autocast("cpu", enabled=False):
            exact = copy.deepcopy(self.linear).double()(x.double())
        return (exact + self.factor * (low - exact)).to(low.dtype)


@pytest.mark.parametrize(("factor", "passes"), [(1.0, True), (1.5, True), (2.75, False), (0.0, True)])
def test_twice_the_hosts_error_is_allowed_and_no_more(factor, passes, monkeypatch):
    torch.manual_seed(0)
    stock, x = Widened(nn.Linear(64, 32)), torch.randn(8, 64)
    monkeypatch.setattr(host_parity, "accelerated", lambda model, inference: (OffBy(model, factor), None))
    if passes:
        host_parity.assert_autocast_errs_no_more(stock, x)
    else:
        with pytest.raises(AssertionError):
            host_parity.assert_autocast_errs_no_more(stock, x)
