"""The numerics rule accepts what it should and catches planted errors."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fastvit_kernels.testing import NumericsError, assert_within_rule, relative_l2


def _inputs(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 7, 24, generator=generator).to(dtype)
    weight = torch.randn(10, 24, generator=generator).to(dtype)
    return x, weight


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_accepts_the_reference_itself_and_a_more_accurate_result(dtype):
    x, weight = _inputs(dtype)
    measured = assert_within_rule(F.linear(x, weight), F.linear, x, weight)
    assert 0 < measured[0].largest <= measured[0].largest_allowed
    assert_within_rule(F.linear(x.double(), weight.double()).to(dtype), F.linear, x, weight)


def test_takes_a_pair_and_several_results():
    x, weight = _inputs()
    y64, y_low = F.linear(x.double(), weight.double()), F.linear(x, weight)
    assert len(assert_within_rule((y_low, -y_low), ((y64, -y64), [y_low, -y_low]))) == 2
    with pytest.raises(NumericsError, match=r"result\[1\]"):
        assert_within_rule((y_low, y_low), ((y64, -y64), (y_low, -y_low)), name="result")
    with pytest.raises(NumericsError, match="got 1 results, expected 2"):
        assert_within_rule((y_low,), ((y64, -y64), (y_low, -y_low)))


def test_one_wrong_element_is_caught_and_shown():
    x, weight = _inputs()
    y = F.linear(x.double(), weight.double()).float()
    y[1, 2, 3] += 1e-3
    with pytest.raises(
        NumericsError, match=r"(?s)largest error 1\.00\de-03.*first of 1 places.*\(1, 2, 3\): got"
    ) as caught:
        assert_within_rule(y, F.linear, x, weight, name="logits")
    assert "logits: outside the numerics rule (float32, shape (3, 7, 10))" in str(caught.value)


def test_a_bias_below_the_largest_error_is_caught_by_the_norm():
    y64 = torch.ones(1000, dtype=torch.float64)
    y_low = y64.float()
    y_low[0] += 1e-4
    shifted = y64.float() + 5e-5
    with pytest.raises(NumericsError, match="outside the numerics rule"):
        assert_within_rule(shifted, (y64, y_low))


def test_the_band_covers_a_reference_without_error_but_no_more():
    y64 = torch.linspace(-4, 4, 50, dtype=torch.float64).to(torch.bfloat16).double()
    y_low = y64.to(torch.bfloat16)
    off_by_one_bit = y_low.clone()
    off_by_one_bit[0] *= 1 + torch.finfo(torch.bfloat16).eps
    assert_within_rule(off_by_one_bit, (y64, y_low))
    with pytest.raises(NumericsError):
        assert_within_rule(y_low * 1.03, (y64, y_low))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_not_finite_is_a_failure(value):
    x, weight = _inputs()
    y = F.linear(x, weight)
    y[0, 0, 0] = value
    with pytest.raises(NumericsError, match="1 of 210 values are NaN or infinite"):
        assert_within_rule(y, F.linear, x, weight)


def test_a_nan_of_the_reference_must_not_be_hidden():
    x, weight = _inputs()
    x[1, 2] = float("nan")
    y = F.linear(x, weight)
    assert_within_rule(y, F.linear, x, weight)
    with pytest.raises(NumericsError, match="or the reverse"):
        assert_within_rule(y.nan_to_num(), F.linear, x, weight)


def test_a_reference_that_overflows_is_refused():
    x = torch.full((2, 2), 300.0, dtype=torch.float16)
    with pytest.raises(ValueError, match="overflows"):
        assert_within_rule(torch.zeros(2, 2, dtype=torch.float16), torch.mul, x, x)


def test_shape_and_dtype_belong_to_the_rule():
    x, weight = _inputs()
    y = F.linear(x, weight)
    with pytest.raises(NumericsError, match="got shape"):
        assert_within_rule(y[0], F.linear, x, weight)
    with pytest.raises(NumericsError, match=r"got torch\.bfloat16, expected torch\.float32"):
        assert_within_rule(y.bfloat16(), F.linear, x, weight)
    with pytest.raises(ValueError, match="exact reference in float64"):
        assert_within_rule(y, (y, y))


def test_an_empty_result_only_has_a_shape():
    x, weight = torch.randn(0, 4), torch.randn(3, 4)
    assert_within_rule(torch.empty(0, 3), F.linear, x, weight)
    with pytest.raises(NumericsError, match="got shape"):
        assert_within_rule(torch.empty(0, 4), F.linear, x, weight)


def test_fp32_accumulated_in_bf16_is_caught():
    x, weight = _inputs()
    with pytest.raises(NumericsError):
        assert_within_rule(F.linear(x.bfloat16(), weight.bfloat16()).float(), F.linear, x, weight)


def test_relative_l2():
    a = torch.tensor([3.0, 4.0])
    assert relative_l2(a, a) == 0.0
    assert relative_l2(a * 1.5, a) == pytest.approx(0.5)
    assert relative_l2(torch.zeros(2), torch.zeros(2)) == 0.0
    assert relative_l2(a, torch.zeros(2)) == float("inf")
