"""The numerics rule, input makers and the contract suite, for the tests and the benchmarks."""

from fastvit_kernels.testing.numerics import NumericsError, assert_within_rule, relative_l2

__all__ = ["NumericsError", "assert_within_rule", "relative_l2"]
