"""The contract suite: what every operator and module must do, whatever its backend.

A test file names its cases and inherits the checks::

    class TestPointwiseMLP(Contract):
        cases = inputs.POINTWISE_MLP
        fused = ("pointwise_mlp",)

pytest collects the inherited methods; nothing here imports pytest. Backends that a machine must have are asked for by
name, so a missing one fails these tests instead of skipping them.
"""

from __future__ import annotations

from fastvit_kernels.testing.contract.base import ContractBase
from fastvit_kernels.testing.contract.compilation import Compilation
from fastvit_kernels.testing.contract.execution import Execution
from fastvit_kernels.testing.contract.memory import Memory
from fastvit_kernels.testing.contract.numbers import Numbers
from fastvit_kernels.testing.contract.rejection import Rejection

__all__ = ["Contract", "Rejection"]


class Contract(Numbers, Memory, Execution, Compilation, ContractBase):
    """Everything but `Rejection`, which only fits functions that check their arguments one by one."""
