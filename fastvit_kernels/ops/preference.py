"""Which backend goes first on a GPU, as measured there."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastvit_kernels.ops import tuning
from fastvit_kernels.ops.arguments import short
from fastvit_kernels.ops.operator import Backend, Operator, Tensors
from fastvit_kernels.ops.tuning import FORWARD, TRAINING

# Only these devices have entries.
_DEVICE_TYPE = "cuda"
# What only a measurement puts in front of the reference, which can run anything: `auto` takes it nowhere else.
_BEHIND_REFERENCE = "sdpa"


def in_order(operator: Operator, reference: Backend, tensors: Tensors, static: Any) -> tuple[list[Backend], str]:
    """The backends of `operator` and its reference, most preferred first, and the times that say so.

    Without times, which are "" then, the operator's own order holds. What took part in no measurement comes behind all
    that did, PyTorch's attention then behind the reference as well.
    """
    backends = [*operator.backends, reference]
    if len(backends) > 1 and backends[-2].name == _BEHIND_REFERENCE:
        backends[-2:] = backends[:-3:-1]
    first = tensors[0]
    assert first is not None
    if first.device.type != _DEVICE_TYPE:
        return backends, ""
    order, times = _measured(operator.name, first.device, static.dtype, _needs_gradient(tensors), int(first.shape[-1]))
    if not order:
        return backends, ""
    places = {name: place for place, name in enumerate(order)}
    return sorted(backends, key=lambda backend: places.get(backend.name, len(places))), times


def _needs_gradient(tensors: Tensors) -> bool:
    return torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in tensors)


def _measured(
    operator: str, device: torch.device, dtype: torch.dtype, training: bool, channels: int
) -> tuple[tuple[str, ...], str]:
    """The names of the measured backends, fastest first, and their times as a text; nothing where there are none."""
    capability = "{}.{}".format(*torch.cuda.get_device_capability(device))
    mode = TRAINING if training else FORWARD
    found = tuning.current().preference(operator, capability, short(dtype), mode, channels)
    return ((), "") if found is None else (found.order, found.text)


# torch.compile calls this function instead of tracing into it; see `triton_support`.
_measured._dynamo_marked_constant = True  # type: ignore[attr-defined]
