"""Nobody is timed before their numbers are right."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastvit_kernels.bench.cases import Case, Outputs
from fastvit_kernels.testing.numerics import FACTOR, NumericsError, assert_within_rule, relative_l2

END_TO_END_FP32 = 1e-5


class Verdict(NamedTuple):
    """Relative L2 error against fp64 and what is allowed; of several results the one that uses most of it."""

    error: float
    allowed: float


def check(case: Case, variant: str, outputs: Outputs, *, ours: bool) -> Verdict:
    """Judge a peer's results.

    Their relative L2 error against fp64 may be twice that of the stock module in this variant's precision, plus
    rounding; of a whole model in fp32 it may be `END_TO_END_FP32`. Ours keep the rest of the numerics rule as well:
    a foreign runtime is not sent away because one element of a sum came out in another order.

    Raises:
        NumericsError: the results are outside these bounds, or not of the expected number and shape.
    """
    end_to_end = case.end_to_end and variant == "fp32"
    low = case.low(variant)
    if len(outputs) != len(low):
        raise NumericsError(f"got {len(outputs)} results, expected {len(low)}")
    # A runtime may hand bf16 results out in fp32.
    rounded = [found.to(expected.dtype) for found, expected in zip(outputs, low, strict=True)]
    if ours and not end_to_end:
        assert_within_rule(rounded, (case.exact, low))
    verdicts = [_judge(*tensors, end_to_end) for tensors in zip(rounded, case.exact, low, strict=True)]
    return max(verdicts, key=lambda verdict: verdict.error / verdict.allowed)


def _judge(found: Tensor, exact: Tensor, low: Tensor, end_to_end: bool) -> Verdict:
    if found.shape != exact.shape:
        raise NumericsError(f"got shape {tuple(found.shape)}, expected {tuple(exact.shape)}")
    rule = FACTOR * relative_l2(low, exact) + torch.finfo(low.dtype).eps
    verdict = Verdict(relative_l2(found, exact), END_TO_END_FP32 if end_to_end else rule)
    # Not "error > allowed": NaN must fail.
    if not verdict.error <= verdict.allowed:
        raise NumericsError(f"relative L2 error {verdict.error:.2e}, allowed {verdict.allowed:.2e}")
    return verdict
