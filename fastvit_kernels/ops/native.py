"""When the C++ backends can run a call."""

from __future__ import annotations

import torch

from fastvit_kernels import _extension
from fastvit_kernels.ops.arguments import short
from fastvit_kernels.ops.operator import Tensors

_CPU_DTYPES = (torch.float32, torch.bfloat16)


def cpu_reasons(tensors: Tensors, dtype: torch.dtype) -> list[str]:
    """Why the CPU kernels cannot run a call (empty: they can)."""
    reasons = []
    problem = _extension.parts["cpu"].problem
    if problem is not None:
        reasons.append(problem)
    first = tensors[0]
    assert first is not None
    if first.device.type != "cpu":
        reasons.append(f"tensors are on {first.device.type}")
    unsupported = {t.dtype for t in tensors if t is not None and t.dtype not in _CPU_DTYPES}
    if dtype not in _CPU_DTYPES:
        unsupported.add(dtype)
    if unsupported:
        names = ", ".join(sorted(short(d) for d in unsupported))
        reasons.append(f"{names}: the CPU kernels take float32 and bfloat16")
    return reasons
