"""Poisoned memory is NaN wherever a kernel may get it from."""

from __future__ import annotations

import ctypes
import threading
from pathlib import Path

import pytest
import torch

from fastvit_kernels.testing.poison import on_poisoned_memory

# From 4 KiB up: what is smaller may be recycled without the allocator's filling, depending on the C library.
SIZES = (1024, 5000, 10**6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_new_memory_is_nan(dtype):
    bytes_per_value = torch.finfo(dtype).bits // 8
    sizes = [size * 4 // bytes_per_value for size in SIZES]
    assert all(t.isnan().all() for t in on_poisoned_memory(lambda: [torch.empty(n, dtype=dtype) for n in sizes]))


def test_recycled_memory_is_nan():
    def recycle():
        for size in SIZES:
            torch.zeros(size)
        return [torch.empty(size) for size in SIZES]

    assert all(t.isnan().all() for t in on_poisoned_memory(recycle))


def test_only_inside():
    def count():
        return sum(int(torch.empty(size).isnan().sum()) for size in SIZES)

    assert on_poisoned_memory(count) == sum(SIZES)
    with pytest.raises(ZeroDivisionError):
        on_poisoned_memory(lambda: 1 // 0)
    # A few may be left over in recycled memory; none is filled any more.
    for size in SIZES:
        torch.zeros(size)
    assert count() < SIZES[0]


def test_in_a_thread_without_a_past():
    local = threading.local()
    local.scratch = torch.zeros(SIZES[0])
    assert not on_poisoned_memory(lambda: hasattr(local, "scratch"))


def test_reaches_the_stable_abi():
    """The C++ kernels allocate through this function, past PyTorch's own filling of uninitialized memory."""
    torch_cpu = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
    size = SIZES[1]

    def allocate():
        shape, strides = (ctypes.c_int64 * 1)(size), (ctypes.c_int64 * 1)(1)
        handle, data = ctypes.c_void_p(), ctypes.c_void_p()
        dtype, cpu = torch_cpu.aoti_torch_dtype_float32(), torch_cpu.aoti_torch_device_type_cpu()
        arguments = (ctypes.c_int64(1), shape, strides, dtype, cpu, 0, ctypes.byref(handle))
        assert torch_cpu.aoti_torch_empty_strided(*arguments) == 0
        assert torch_cpu.aoti_torch_get_data_ptr(handle, ctypes.byref(data)) == 0
        values = torch.tensor((ctypes.c_float * size).from_address(data.value))
        torch_cpu.aoti_torch_delete_tensor_object(handle)
        return values

    torch.zeros(size)
    assert on_poisoned_memory(allocate).isnan().all()
