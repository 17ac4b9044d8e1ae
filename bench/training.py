"""A training step of a case, and the judgement of its gradients.

A step is forward, loss and backward. The loss is a fixed random linear function of the outputs: it costs nothing, and
every gradient counts. The optimiser's step is left out: it is the same for everybody.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from fastvit_kernels.bench.cases import Case, Outputs, as_outputs, deterministic, precision, products
from fastvit_kernels.bench.flops import Cost
from fastvit_kernels.bench.gate import Verdict
from fastvit_kernels.testing.numerics import FACTOR, NumericsError, relative_l2

Around = Callable[[], AbstractContextManager[Any]]
EXACT = "fp64"


def stock(case: Case, variant: str) -> nn.Module:
    """A copy of the stock module that trains; what is random in training is switched off."""
    return deterministic(case.stock(variant).train().requires_grad_(True))


class Training:
    """A module that trains on a case's inputs.

    Attributes:
        leaves: all parameters, and an operator's inputs: nobody trains an image. Gradients come in this order, which is
            that of the names: another implementation may have its modules in another order.

    Args:
        module: compiled or not.
        case: gives the inputs.
        variant: as in `fastvit_kernels.bench.cases`; or `EXACT`, for a module in fp64.
        around: entered for the forward.
    """

    def __init__(self, module: Callable[..., Any], case: Case, variant: str, around: Around = nullcontext) -> None:
        exact = variant == EXACT
        self._variant = "fp32" if exact else variant
        trained = not case.end_to_end
        inputs = case.inputs(self._variant)
        self.inputs = [x.detach().to(torch.float64 if exact else x.dtype).requires_grad_(trained) for x in inputs]
        self._module, self._case, self._around = module, case, around
        self.parameters = dict(module.named_parameters()) if isinstance(module, nn.Module) else {}
        self.buffers = dict(module.named_buffers()) if isinstance(module, nn.Module) else {}
        leaves: dict[str, Tensor] = {name.removeprefix("_orig_mod."): p for name, p in self.parameters.items()}
        if trained:
            leaves |= {f"input {index}": x for index, x in enumerate(self.inputs)}
        self.leaves = [leaves[name] for name in sorted(leaves)]
        self._cotangents: list[Tensor] | None = None

    def forward(self) -> list[Tensor]:
        """The outputs that have a gradient."""
        with precision(self._variant, self._case.device), self._around():
            found = as_outputs(self._module(*self.inputs))
        return [out for out in found if out.requires_grad]

    def gradients(self) -> Outputs:
        """Forward and backward, by `torch.autograd.grad`."""
        outputs = self.forward()
        grads = torch.autograd.grad(outputs, self.leaves, self._slopes(outputs), allow_unused=True)
        return self._complete(grads)

    def step(self) -> Outputs:
        """What a training script does: `zero_grad(set_to_none=True)`, forward, `backward()`."""
        for leaf in self.leaves:
            leaf.grad = None
        outputs = self.forward()
        torch.autograd.backward(outputs, self._slopes(outputs))
        return self._complete([leaf.grad for leaf in self.leaves])

    def _complete(self, grads: Sequence[Tensor | None]) -> Outputs:
        """Zeros, without memory of their own, where no output depends on a leaf: some modules have such gradients."""
        pairs = zip(grads, self.leaves, strict=True)
        return tuple(leaf.new_zeros(()).expand(leaf.shape) if grad is None else grad for grad, leaf in pairs)

    def _slopes(self, outputs: list[Tensor]) -> list[Tensor]:
        """The loss's gradient."""
        if self._cotangents is None:
            self._cotangents = _cotangents(outputs)
        return self._cotangents


def _cotangents(outputs: list[Tensor]) -> list[Tensor]:
    """The same values for every dtype."""
    made = []
    for seed, out in enumerate(outputs):
        generator = torch.Generator(out.device).manual_seed(seed)
        values = torch.randn(out.shape, generator=generator, device=out.device)
        made.append(values.bfloat16().to(out.dtype))
    return made


def check(case: Case, variant: str, found: Outputs) -> Verdict:
    """Judge all gradients as one vector: single ones of a whole model hang on few numbers, or are nothing but noise.

    Raises:
        NumericsError: their relative L2 error against fp64 is more than twice that of the stock module plus rounding,
            or they are not of the expected number and shapes.
    """
    low = case.remember(("gradients", variant), lambda: Training(stock(case, variant), case, variant).gradients())
    exact = case.remember(("gradients", EXACT), lambda: _exact_gradients(case))
    shapes = [[tuple(g.shape) for g in grads] for grads in (found, exact)]
    if shapes[0] != shapes[1]:
        raise NumericsError(f"gradients: got {shapes[0]}, expected {shapes[1]}")
    vectors = [torch.cat([g.double().flatten() for g in grads]) for grads in (found, exact, low)]
    eps = torch.finfo(products(variant)).eps
    verdict = Verdict(relative_l2(vectors[0], vectors[1]), FACTOR * relative_l2(vectors[2], vectors[1]) + eps)
    # Not "error > allowed": NaN must fail.
    if not verdict.error <= verdict.allowed:
        raise NumericsError(f"gradients: relative L2 error {verdict.error:.2e}, allowed {verdict.allowed:.2e}")
    return verdict


def _exact_gradients(case: Case) -> Outputs:
    return Training(copy.deepcopy(stock(case, "fp32")).double(), case, EXACT).gradients()


def cost(forward: Cost) -> Cost:
    """Of forward and backward: three products for one; inputs and outputs, and their gradients, are moved once."""
    return Cost(3 * forward.macs, 2 * forward.weights, 2 * forward.activations)
