"""What is measured: one module, its inputs, and its results in fp64 to judge everybody by."""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from fastvit_kernels.bench.flops import Cost
from fastvit_kernels.nn import DropPath
from fastvit_kernels.testing.numerics import to_fp64

# How a peer can reach a dtype. `autocast`: fp32 weights under torch.autocast; `cast`: the model in bf16 throughout;
# `hint`: a runtime told to compute an fp32 model in bf16.
VARIANTS = {"fp32": ("fp32",), "bf16": ("autocast", "cast", "hint")}
# On GPUs alone.
HALF_VARIANTS = {"fp16": ("autocast-fp16", "cast-fp16")}

IMAGES_IN_FP64 = 8

Outputs = tuple[Tensor, ...]
T = TypeVar("T")


def as_outputs(result: Tensor | Outputs) -> Outputs:
    return (result,) if isinstance(result, Tensor) else tuple(result)


def products(variant: str) -> torch.dtype:
    """The dtype of its matrix products."""
    if variant == "fp32":
        return torch.float32
    return torch.float16 if variant in HALF_VARIANTS["fp16"] else torch.bfloat16


def precision(variant: str, device: str = "cpu") -> AbstractContextManager[Any]:
    """Autocast where the variant says so."""
    return torch.autocast(device, products(variant)) if variant.startswith("autocast") else nullcontext()


@contextmanager
def inference(variant: str, device: str = "cpu") -> Iterator[None]:
    """No gradients, and the variant's precision."""
    with torch.inference_mode(), precision(variant, device):
        yield


@dataclass(eq=False)
class Case:
    """One measured call.

    Attributes:
        suite: the operator's or model's name.
        name: which of the suite's shapes.
        batch: images.
        count: makes `cost`; counting takes time that whoever only lists cases does not want to spend.
        build: the stock module: fp32, eval mode, reference backend.
        make_inputs: its inputs in fp32.
        fuse: takes a copy of the stock module, returns it running on the fused kernels with packed weights.
        settle: changes the stock module's random weights where they would make activations explode or vanish.
        products: positions of the inputs that matrix products make: autocast delivers them in its dtype.
        attention: there is an attention in it that `F.scaled_dot_product_attention` can stand in for.
        end_to_end: a whole model, held to the end-to-end rule in fp32.
        twin: takes the stock module, returns transformers' module with the same weights; None where it has none.
        device: where the module and its inputs are.
    """

    suite: str
    name: str
    batch: int
    count: Callable[[], Cost]
    build: Callable[[], nn.Module]
    make_inputs: Callable[[], tuple[Tensor, ...]]
    fuse: Callable[[nn.Module], nn.Module]
    settle: Callable[[nn.Module], None] | None = None
    products: tuple[int, ...] = ()
    attention: bool = False
    end_to_end: bool = False
    twin: Callable[[nn.Module], nn.Module] | None = None
    device: str = "cpu"
    _remembered: dict[Hashable, Any] = field(default_factory=dict, repr=False)

    @property
    def title(self) -> str:
        """Suite and shape; a model's suite has one shape of the same name."""
        return self.suite if self.name == self.suite else f"{self.suite} {self.name}"

    @cached_property
    def cost(self) -> Cost:
        """Arithmetic and least traffic."""
        return self.count()

    @contextmanager
    def _draws(self, seed: int) -> Iterator[None]:
        """What is made inside is on the case's device, its random values those of the seed."""
        devices = [torch.cuda.current_device()] if self.device == "cuda" else []
        with torch.random.fork_rng(devices=devices), torch.device(self.device):
            torch.manual_seed(seed)
            yield

    @cached_property
    def _stock(self) -> nn.Module:
        with self._draws(0):
            module = self.build().eval().requires_grad_(False)
            _enliven(module)
            if self.settle is not None:
                self.settle(module)
        return module

    @cached_property
    def _fp32_inputs(self) -> tuple[Tensor, ...]:
        with self._draws(1):
            return tuple(_channels_last(x) for x in self.make_inputs())

    def stock(self, variant: str = "fp32") -> nn.Module:
        """A copy of the stock module, filters in channels_last memory, weights in the variant's dtype."""
        return as_user_has_it(copy.deepcopy(self._stock), variant)

    def inputs(self, variant: str = "fp32") -> tuple[Tensor, ...]:
        """The inputs as the variant meets them."""
        ways = {"cast": range(len(self._fp32_inputs)), "autocast": self.products}
        low, dtype = ways.get(variant.partition("-")[0], ()), products(variant)
        return tuple(x.to(dtype) if index in low else x for index, x in enumerate(self._fp32_inputs))

    @cached_property
    def exact(self) -> Outputs:
        """The stock module's results in fp64, found a few images at a time: a batch of 64 takes too much memory."""
        module = copy.deepcopy(self._stock).double()
        with torch.inference_mode():
            parts = [
                as_outputs(module(*to_fp64([x[first : first + IMAGES_IN_FP64] for x in self._fp32_inputs])))
                for first in range(0, self.batch, IMAGES_IN_FP64)
            ]
            return tuple(torch.cat(results) for results in zip(*parts, strict=True))

    def low(self, variant: str) -> Outputs:
        """The stock module's results in the variant's precision; a hint is held to what autocast gives."""
        variant = "autocast" if variant == "hint" else variant

        def run() -> Outputs:
            with inference(variant, self.device):
                return as_outputs(self.stock(variant)(*self.inputs(variant)))

        return self.remember(("low", variant), run)

    def remember(self, key: Hashable, make: Callable[[], T]) -> T:
        """What `make` returned for this key: made once for all peers that need it."""
        if key not in self._remembered:
            self._remembered[key] = make()
        found: T = self._remembered[key]
        return found


def as_user_has_it(module: nn.Module, variant: str) -> nn.Module:
    """Weights in the variant's dtype, filters in channels_last memory."""
    module = module.to(products(variant)) if variant.startswith("cast") else module
    # nn.Module.to takes a memory format; its type stubs do not say so.
    converted: nn.Module = module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return converted


def deterministic(module: nn.Module) -> nn.Module:
    """The module with dropout and stochastic depth off, whatever else in it trains."""
    for part in module.modules():
        if isinstance(part, (nn.Dropout, DropPath)):
            part.eval()
    return module


def _channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x


def _enliven(module: nn.Module) -> None:
    """Weights that make every part of the input and of the module count in the results.

    Fresh models hardly react to their input, and their norms and biases of 0 and 1 may be ignored without a trace.
    """
    for parameter in module.parameters():
        if parameter.ndim == 1:
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
        else:
            parameter.normal_(0.0, parameter[0].numel() ** -0.5)
    for name, buffer in module.named_buffers():
        if name.endswith("running_mean"):
            buffer.normal_(0.0, 0.1)
        elif name.endswith("running_var"):
            buffer.uniform_(0.5, 1.5)
