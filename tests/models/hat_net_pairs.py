"""The same HAT-Nets in this library and in plain PyTorch, and the sizes of small ones."""

from __future__ import annotations

import functools
from typing import NamedTuple

import plain_cvt
import plain_hat_net
import torch
from torch import nn

from fastvit_kernels.models import create_model

SMALL = {"dims": (16, 24, 32, 40), "depths": (1, 2, 1, 1), "head_dim": 8, "expansions": (4, 4, 2, 2)}


class Pair(NamedTuple):
    ours: nn.Module
    theirs: nn.Module


def on_memory(make, *arguments, **options):
    """A model with its weights drawn once: initialising tens of millions that are replaced takes longer."""
    with torch.device("meta"):
        model = make(*arguments, **options)
    return plain_cvt.randomize(_zeros(model))


def _zeros(model):
    model = model.double().to_empty(device="cpu")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            is_scale = name.endswith(".weight") and parameter.ndim == 1
            parameter.fill_(1.0 if is_scale else 0.0)
    return model


@functools.lru_cache(maxsize=1)
def pair(name, **overrides):
    """The same weights in both implementations, in fp64. Put changes back: the next test gets the same pair."""
    theirs = on_memory(plain_hat_net.HATNet, num_classes=10, **{**plain_hat_net.VARIANTS[name], **overrides})
    with torch.device("meta"):
        ours = create_model(name, 10, **overrides)
    ours = ours.double().to_empty(device="cpu")
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return Pair(ours.eval(), theirs.eval())


def small(num_classes=10, **overrides):
    """A small HAT-Net with weights large enough for every layer to matter; arguments go to `create_model`."""
    torch.manual_seed(0)
    return plain_cvt.randomize(create_model("hat_net_small", num_classes, **{**SMALL, **overrides}))


def small_plain():
    return plain_cvt.randomize(plain_hat_net.HATNet(**SMALL, num_classes=10))
