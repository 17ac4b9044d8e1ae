"""Repeatability, threads and autocast."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from fastvit_kernels import use_backend
from fastvit_kernels.testing.calls import Call, Results, as_list, cotangents, differentiate
from fastvit_kernels.testing.contract.base import (
    ContractBase,
    backward_operators,
    check,
    forward,
    on_cases,
    pooled,
    run,
)
from fastvit_kernels.testing.inputs import FP32, FP64, Case, Precision
from fastvit_kernels.testing.poison import on_poisoned_memory

_PYTHON_THREADS = 8
# Backends of PyTorch's own operators, which repeat their bits on one thread, and the gradients that those compute.
_OF_PYTORCH = ("sdpa",)
_GRADIENTS_OF_PYTORCH = (".default", ".sdpa")


class Execution(ContractBase):
    """The same call gives the same bits: again, on other thread counts, beside other threads."""

    def test_bits_do_not_depend_on_the_thread_count(self, case: Case, precision: Precision, backend: str) -> None:
        """On new memory each time, so that what one thread leaves out shows."""
        call = case.call(precision)
        alone = _with_threads(1, call, backend)
        for threads in (1,) if backend in _OF_PYTORCH else (2, 3, 1):
            again = on_poisoned_memory(partial(_with_threads, threads, call, backend))
            assert_same_bits(alone, again)

    def test_gradient_bits_do_not_depend_on_the_thread_count(
        self, case: Case, precision: Precision, backend: str
    ) -> None:
        """On new memory each time; where PyTorch's own operators compute gradients, they repeat on one thread."""
        call = case.call(precision)
        of_kernels = not isinstance(call.function, nn.Module) and not any(
            name.endswith(_GRADIENTS_OF_PYTORCH) for name in backward_operators(call, backend)
        )
        alone = _gradients_with_threads(1, call, backend)
        for threads in (2, 3, 1) if of_kernels else (1,):
            again = on_poisoned_memory(partial(_gradients_with_threads, threads, call, backend))
            assert_same_bits(alone, again)

    @on_cases("smallest")
    def test_gradients_repeat_under_deterministic_algorithms(self, case: Case, backend: str) -> None:
        with _deterministic(), thread_count(2):
            first, second = (run(case.call(FP32), backend) for _ in range(2))
        assert_same_bits(first.outputs, second.outputs)
        assert_same_bits(list(first.gradients.values()), list(second.gradients.values()))

    @on_cases("smallest")
    def test_threads_do_not_disturb_each_other(self, case: Case, backend: str) -> None:
        threads, repetitions = (2, 1) if backend in self.small_only else (_PYTHON_THREADS, 3)
        calls = [case.call(FP32, seed) for seed in range(threads)]
        alone = [forward(call, backend).outputs for call in calls]
        together: list[Sequence[Tensor]] = [[] for _ in calls]
        errors: list[BaseException] = []
        barrier = threading.Barrier(threads)

        def work(index: int) -> None:
            try:
                barrier.wait()
                for _ in range(repetitions):
                    together[index] = forward(calls[index], backend).outputs
            except BaseException as error:  # noqa: BLE001
                errors.append(error)

        workers = [threading.Thread(target=work, args=(index,)) for index in range(threads)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        assert not errors, errors
        for expected_outputs, found in zip(alone, together, strict=True):
            assert_same_bits(expected_outputs, found)

    @on_cases("smallest")
    def test_autocast(self, case: Case, backend: str) -> None:
        """fp32 arguments under bf16 autocast: dtypes and accuracy of the reference, forward and backward."""
        results: dict[str, list[Results]] = {"found": [], "exact": [], "low": []}
        for seed in range(self.draws):
            call = case.call(FP32, seed)
            with torch.autocast("cpu", torch.bfloat16):
                results["found"].append(run(call, backend))
                results["low"].append(run(call, "reference"))
                results["exact"].append(_exact(call, results["low"][-1].outputs))
        found, exact, low = (pooled(draws) for draws in results.values())
        check(found, exact, low, case.vanishing)

    @on_cases("smallest")
    def test_autocast_leaves_fp64_alone(self, case: Case) -> None:
        call = case.call(FP64)
        with torch.autocast("cpu", torch.bfloat16):
            inside = run(call, "auto")
        assert_same_bits(inside.outputs, run(call, "auto").outputs)

    @on_cases("smallest")
    def test_backward_does_not_depend_on_the_autocast_around_it(self, case: Case, backend: str) -> None:
        """The forward fixed the precision; a backward called inside or outside autocast keeps it."""
        for around_forward in (False, True):
            results = [_backward_apart(case.call(FP32), backend, around_forward, inside) for inside in (False, True)]
            assert_same_bits(*results)


def _with_threads(count: int, call: Call, backend: str) -> list[Tensor]:
    with thread_count(count):
        return forward(call, backend).outputs


def _gradients_with_threads(count: int, call: Call, backend: str) -> list[Tensor | None]:
    with thread_count(count):
        return list(run(call, backend).gradients.values())


def _exact(call: Call, like: Sequence[Tensor]) -> Results:
    grads = [g.double() for g in cotangents(like)]
    with use_backend("reference"):
        return differentiate(call.fp64(), grads=lambda outputs: grads)


def _backward_apart(call: Call, backend: str, around_forward: bool, around_backward: bool) -> list[Tensor]:
    call = call.fresh()
    leaves = list(call.leaves().values())
    for leaf in leaves:
        leaf.requires_grad_()
    with use_backend(backend), torch.autocast("cpu", torch.bfloat16, enabled=around_forward):
        outputs = as_list(call())
    with torch.autocast("cpu", torch.bfloat16, enabled=around_backward):
        return list(torch.autograd.grad(outputs, leaves, cotangents(outputs)))


def assert_same_bits(first: Sequence[Tensor | None], second: Sequence[Tensor | None]) -> None:
    for index, (a, b) in enumerate(zip(first, second, strict=True)):
        if a is None or b is None:
            assert a is b
        else:
            assert a.dtype == b.dtype and torch.equal(a, b), f"result {index} differs between runs"


@contextmanager
def thread_count(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _deterministic() -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
