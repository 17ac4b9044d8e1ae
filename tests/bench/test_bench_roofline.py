"""The floor, and what it is made of."""

from __future__ import annotations

import re

import pytest

from fastvit_kernels import _extension
from fastvit_kernels.bench import machine, roofline
from fastvit_kernels.bench.flops import Cost
from fastvit_kernels.bench.roofline import Roofline


def test_floor_is_the_slower_of_arithmetic_and_traffic() -> None:
    limits = Roofline(fp32_gflops=100.0, bf16_gflops=400.0, copy_gbs=10.0)
    busy = Cost(macs=10**9, weights=10**3, activations=10**3)
    assert limits.floor(busy, "fp32") == pytest.approx(2e9 / 100e9)
    assert limits.floor(busy, "bf16") == pytest.approx(2e9 / 400e9)
    idle = Cost(macs=10**3, weights=10**7, activations=10**7)
    assert limits.floor(idle, "fp32") == pytest.approx(80e6 / 10e9)
    assert limits.floor(idle, "bf16") == pytest.approx(40e6 / 10e9)


def test_bf16_without_instructions_of_its_own_is_bound_by_fp32() -> None:
    assert Roofline(100.0, 60.0, 10.0).peak("bf16") == 100.0


def test_best_keeps_each_limit() -> None:
    assert Roofline(1.0, 5.0, 3.0).best(Roofline(2.0, 4.0, 6.0)) == Roofline(2.0, 5.0, 6.0)


def test_limits_are_measured() -> None:
    found = roofline.measure()
    # One lane of one core at 0.1 GHz would still pass; a stub that returns 0 or a time does not.
    assert found.fp32_gflops > 0.2 and found.bf16_gflops > 0.2 and found.copy_gbs > 0.2
    assert found.fp32_gflops < 1e6 and found.copy_gbs < 1e5


def test_without_kernels_the_reason_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(_extension.parts, "cpu", _extension.Part("cpu", None, "not built: no compiler"))
    with pytest.raises(RuntimeError, match="not built: no compiler"):
        roofline.measure()


def test_machine() -> None:
    assert machine.version("torch") and machine.version("no-such-package-at-all") == ""
    assert re.fullmatch(r"|[0-9a-f]{12,}(-dirty)?", machine.commit())
