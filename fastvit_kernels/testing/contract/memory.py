"""What a kernel writes and what it leaves alone."""

from __future__ import annotations

import torch

from fastvit_kernels.testing.calls import as_list
from fastvit_kernels.testing.contract.base import ContractBase, forward, on_cases, run
from fastvit_kernels.testing.inputs import FP32, Case, Precision
from fastvit_kernels.testing.poison import on_poisoned_memory


class Memory(ContractBase):
    """Outputs are fresh, complete and dense; inputs stay as they are."""

    def test_everything_is_written(self, case: Case, backend: str, precision: Precision) -> None:
        """New memory starts as NaN, outputs and scratch alike."""
        self.hold(case, precision, lambda call: on_poisoned_memory(lambda: forward(call, backend)))

    @on_cases("smallest")
    def test_gradients_are_written(self, case: Case, backend: str) -> None:
        self.hold(case, FP32, lambda call: on_poisoned_memory(lambda: run(call, backend)))

    @on_cases("smallest", "empty")
    def test_inputs_are_left_alone(self, case: Case, backend: str) -> None:
        call = case.call(FP32)
        before = {name: t.clone() for name, t in call.leaves().items()}
        run(call, backend)
        for name, tensor in call.leaves().items():
            assert torch.equal(tensor, before[name]), f"{name} was changed"

    @on_cases("smallest", "empty")
    def test_outputs_are_fresh_and_dense(self, case: Case, backend: str) -> None:
        call = case.call(FP32)
        inputs = {t.untyped_storage().data_ptr() for t in call.leaves().values()} - {0}
        outputs = forward(call, backend).outputs
        storages = [o.untyped_storage().data_ptr() for o in as_list(outputs)]
        for o in outputs:
            dense = o.is_contiguous() or o.is_contiguous(memory_format=torch.channels_last)
            assert dense, f"output of shape {tuple(o.shape)} has strides {o.stride()}"
        assert not inputs.intersection(storages), "an output shares an input's memory"
        assert len({s for s in storages if s}) == len([s for s in storages if s]), "outputs share memory"
