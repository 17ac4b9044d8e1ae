"""What transformers' models share: their activations, and the hooks that record what a caller asks for."""

from __future__ import annotations

import importlib
from typing import Any

import torch.nn.functional as F
from torch import nn
from transformers.activations import GELUActivation, QuickGELUActivation

from fastvit_kernels.nn import fused
from fastvit_kernels.nn.activations import QuickGELU

# Why a call for attention weights runs the host's attention.
WEIGHTS_WANTED = "attention: its weights are asked for, which the fused operator never holds"

_GELU = nn.GELU()
_QUICK_GELU = QuickGELU()


def _recorder() -> Any:
    """What holds the outputs that are recorded in the current call; transformers 4 records none this way."""
    try:
        return importlib.import_module("transformers.utils.output_capturing")._active_collector
    except (ImportError, AttributeError):
        return None


_RECORDER = _recorder()


def activation(module: nn.Module) -> nn.Module:
    """The activation; transformers' GELU and QuickGELU as PyTorch's and ours, so that the operators know them."""
    if fused.has_hooks(module):
        return module
    if type(module) is GELUActivation and module.act in (F.gelu, module._gelu_python):
        return _GELU
    return _QUICK_GELU if type(module) is QuickGELUActivation else module


def has_hooks(module: nn.Module) -> bool:
    """Whether something on the module expects it to be called, other than to record what nobody asks for now.

    transformers leaves the hooks that record outputs on a model once any output was asked for.
    """
    recording = {key for key, hook in module._forward_hooks.items() if _records(hook)}
    if not recording:
        return fused.has_hooks(module)
    others = module._forward_hooks.keys() - recording
    return (
        bool(others or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks)
        or "forward" in module.__dict__
    )


def is_recorded(module: nn.Module, output: str) -> bool:
    """Whether the caller of the model wants this output (`"attentions"`, say) of the module recorded."""
    if not any(map(_records, module._forward_hooks.values())):
        return False
    outputs = _RECORDER.get()
    return outputs is not None and output in outputs


def _records(hook: Any) -> bool:
    return _RECORDER is not None and getattr(hook, "__module__", "") == "transformers.utils.output_capturing"
