"""The bridge to the C++ kernels of local_attention."""

from __future__ import annotations

import torch
from torch import Tensor

from fastvit_kernels.ops.local_attention.reference import Static
from fastvit_kernels.ops.native import cpu_reasons, cuda_reasons, shared_memory_reasons
from fastvit_kernels.ops.operator import GradientKernels, Outputs, Tensors


class Cpu(GradientKernels):
    """C++ for the CPU: windows are gathered, projected, attended and put back by one task each, in the cache."""

    name = "cpu"
    backward = "local_attention_backward", "native"

    def supports(self, tensors: Tensors, static: Static) -> list[str]:
        return cpu_reasons(tensors, static.dtype)

    def reads_outputs(self, static: Static) -> bool:
        return static.return_statistics

    def run(self, tensors: Tensors, packed: Tensor | None, static: Static) -> Outputs:
        return tuple(torch.ops.fastvit.local_attention.default(tensors, packed, *static))


# Of the CUDA kernels: pixels of a window that stay on chip together, channels of a head, pixels of a window's side.
_TILE = 64
_WIDEST_HEAD = 128
_LARGEST_WINDOW = 64


class Cuda:
    """C++ for GPUs: windows are projected, attended, projected and put back by one block of threads each."""

    name = "cuda"

    def supports(self, tensors: Tensors, static: Static) -> list[str]:
        found = cuda_reasons(tensors, tensors[11], static.dtype)
        area = static.window_size**2
        if tensors[6] is not None and area > _TILE:
            found.append(f"windows of {area} pixels: the CUDA kernels take up to {_TILE} with a qkv_weight")
        if static.window_size > _LARGEST_WINDOW:
            found.append(f"windows {static.window_size} pixels wide: the CUDA kernels take up to {_LARGEST_WINDOW}")
        widest = max(_head_widths(tensors, static))
        if widest > _WIDEST_HEAD:
            return [*found, f"heads of {widest} channels: the CUDA kernels take up to {_WIDEST_HEAD}"]
        x = tensors[0]
        assert x is not None
        return found + shared_memory_reasons(shared_memory(tensors, static), x.device)

    def run(self, tensors: Tensors, packed: Tensor | None, static: Static) -> Outputs:
        return tuple(torch.ops.fastvit.local_attention.default(tensors, None, *static))


def _head_widths(tensors: Tensors, static: Static) -> tuple[int, int]:
    """Of queries and keys, and of values."""
    x, v, qkv_weight = tensors[0], tensors[2], tensors[6]
    assert x is not None
    if v is not None:
        return x.shape[-1] // static.num_heads, v.shape[-1] // static.num_heads
    width = (x.shape[-1] if qkv_weight is None else qkv_weight.shape[0]) // (3 * static.num_heads)
    return width, width


def shared_memory(tensors: Tensors, static: Static) -> int:
    """Bytes of shared memory that a block of the CUDA kernels needs: `layout_of` in csrc/cuda/local_attention.cu."""
    x = tensors[0]
    assert x is not None
    size = static.dtype.itemsize
    width, value_width = _head_widths(tensors, static)

    def tile(columns: int) -> int:
        step = 32 // size
        return _TILE * (-(-columns // step) * step * size + 16)

    going_out = max(width, value_width, 64 if tensors[9] is not None else 0)
    places = -(-(static.window_size**2) // _TILE) * _TILE
    total = 64 + 2 * places * 4 + tile(going_out) + tile(width) + tile(-(-value_width // 16) * 16)
    if tensors[6] is not None:
        total += tile(x.shape[-1])
    if tensors[9] is not None:
        total += tile(value_width * static.num_heads)
    if tensors[6] is not None or tensors[9] is not None:
        total += 2 * 64 * (128 + 16)
    return total
