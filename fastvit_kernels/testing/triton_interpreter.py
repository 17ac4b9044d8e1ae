"""bf16 as it should be in Triton's interpreter, for tests."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np


@contextmanager
def rounded_bfloat16() -> Iterator[None]:
    """In this block the interpreter rounds fp32 to the nearest bf16, ties to even, as GPUs do; by itself it truncates.

    It replaces the interpreter's private conversion function. Arithmetic on bf16 stays wrong there, since the
    interpreter calculates with bit patterns: kernels convert to fp32 first, and tests find those that do not.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    original = interpreter._convert_float

    def convert(data: Any, source: Any, target: Any, rounding_mode: Any) -> Any:
        if (source, target) != (tl.float32, tl.bfloat16):
            return original(data, source, target, rounding_mode)
        return round_to_bfloat16(data)

    interpreter._convert_float = convert
    try:
        yield
    finally:
        interpreter._convert_float = original


def round_to_bfloat16(data: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Bit patterns, as uint16, of the bf16 numbers nearest to these fp32 numbers."""
    bits = np.asarray(data, np.float32).view(np.uint32)
    # Just under half of the last place kept, and the other bit where that place is odd: a carry rounds up.
    rounded = bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    # A carry out of a NaN's fraction would make it infinite.
    quiet = bits | np.uint32(0x00400000)
    return (np.where(np.isnan(data), quiet, rounded) >> np.uint32(16)).astype(np.uint16)
