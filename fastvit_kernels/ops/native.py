"""When the C++ backends can run a call."""

from __future__ import annotations

import functools
from typing import Any

import torch

from fastvit_kernels import _extension
from fastvit_kernels.ops.arguments import short
from fastvit_kernels.ops.operator import Tensors

_CPU_DTYPES = (torch.float32, torch.bfloat16)
_CUDA_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_OLDEST_GPU = (8, 0)
# Bytes that a block has on an A100, which answers where there is no GPU.
_SHARED_MEMORY = 163 * 1024


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


def cuda_reasons(tensors: Tensors, residual: torch.Tensor | None, dtype: torch.dtype) -> list[str]:
    """Why the CUDA C++ kernels cannot run a call that adds `residual` to its result (empty: they can)."""
    reasons = []
    problem = _extension.parts["cuda"].problem
    if problem is not None:
        reasons.append(problem)
    first = tensors[0]
    assert first is not None
    if first.device.type != "cuda":
        reasons.append(f"tensors are on {first.device.type}")
    elif (problem := _gpu_problem(first.device)) is not None:
        reasons.append(problem)
    unsupported = {t.dtype for t in tensors if t is not None and t.dtype not in _CUDA_DTYPES}
    if dtype not in _CUDA_DTYPES:
        unsupported.add(dtype)
    if unsupported:
        names = ", ".join(sorted(short(d) for d in unsupported))
        reasons.append(f"{names}: the CUDA kernels take float32, bfloat16 and float16")
    elif residual is not None and torch.float32 not in (residual.dtype, dtype) and residual.dtype is not dtype:
        reasons.append(
            f"a residual of {short(residual.dtype)} beside {short(dtype)}: the CUDA kernels add no such pair"
        )
    return reasons


@functools.cache
def gpu_problem(device: torch.device) -> str | None:
    """Why the CUDA C++ kernels cannot run anything on this GPU, or None."""
    if torch.version.hip is not None:
        return "the GPU is no NVIDIA GPU"
    found = torch.cuda.get_device_capability(device)
    if found < _OLDEST_GPU:
        return "the GPU's compute capability is {}.{}, expected {}.{} or newer".format(*found, *_OLDEST_GPU)
    return None


def shared_memory_reasons(needed: int, device: torch.device) -> list[str]:
    """Why a block of the CUDA C++ kernels finds no room for this many bytes (empty: it does)."""
    most = _shared_memory(device)
    return [f"a block takes {needed} bytes of shared memory, {most} are there"] if needed > most else []


@functools.cache
def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that a block can have; `most_shared_memory` in csrc/cuda."""
    if device.type != "cuda" or torch.version.hip is not None:
        return _SHARED_MEMORY
    properties: Any = torch.cuda.get_device_properties(device)  # whose annotations lack it
    return int(properties.shared_memory_per_block_optin)


def _gpu_problem(device: torch.device) -> str | None:
    return gpu_problem(device)


def _shared_memory(device: torch.device) -> int:
    return shared_memory(device)


# torch.compile calls these functions instead of tracing into them, as in `triton_support`.
_gpu_problem._dynamo_marked_constant = True  # type: ignore[attr-defined]
_shared_memory._dynamo_marked_constant = True  # type: ignore[attr-defined]
