"""Triton's gradients in the interpreter: the numerics rule on small cases, and what they leave to the reference."""

from __future__ import annotations

import pytest

from fastvit_kernels.testing.contract.base import backward_operators, check, pooled, reference_results, run
from fastvit_kernels.testing.inputs import (
    BF16,
    BF16_FP32,
    CASES,
    FP16,
    FP32,
    Case,
    Precision,
    pointwise_mlp_case,
)


def published(operator: str, *names: str) -> list[Case]:
    return [next(case for case in CASES[operator] if case.name == name) for name in names]


# By operator, cases whose gradients take different ways through the kernels; the contract suite has others.
CHOSEN = {
    "pointwise_mlp": [
        *published("pointwise_mlp", "odd_hidden", "other_out_width", "norm_without_affine", "bare"),
        pointwise_mlp_case("rows_in_parts", leading=(2, 70), channels=8),
    ],
}
# Errors of few numbers are taken together from several draws: the largest of a dozen is too random.
DRAWS = 2


@pytest.mark.parametrize(
    ("operator", "case", "precision"),
    [
        pytest.param(operator, case, precision, id=f"{operator}-{case}-{precision}")
        for operator, cases in CHOSEN.items()
        for case in cases
        for precision in ((FP32, BF16, FP16, BF16_FP32) if case is cases[0] else (FP32, BF16))
    ],
)
def test_gradients(operator: str, case: Case, precision: Precision) -> None:
    assert backward_operators(case.call(precision), "triton") == {f"fastvit.{operator}_backward.triton"}
    calls = [case.call(precision, seed) for seed in range(DRAWS)]
    exact, low = zip(*map(reference_results, calls), strict=True)
    check(pooled([run(call, "triton") for call in calls]), pooled(exact), pooled(low), case.vanishing)
