"""The same weights in a model of this library and in plain PyTorch, and whether both compute the same."""

from __future__ import annotations

from typing import NamedTuple

import plain_cvt
import torch
from torch import nn

from fastvit_kernels.models import create_model
from fastvit_kernels.testing import relative_l2

TOLERANCE = 1e-12


class Pair(NamedTuple):
    ours: nn.Module
    theirs: nn.Module


def pair(name, plain, **options):
    """Both in fp64, evaluation mode; `options` go to `create_model`."""
    theirs = plain_cvt.randomize(plain).double()
    with torch.device("meta"):
        ours = create_model(name, 10, **options)
    ours = ours.double().to_empty(device="cpu")
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return Pair(ours.eval(), theirs.eval())


def run(model, x):
    """Logits, gradient of the input, gradients of the parameters."""
    model.zero_grad()
    x = x.clone().requires_grad_()
    y = model(x)
    (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    return y.detach(), x.grad, gradients


def assert_same(pair, x):
    """Logits, all gradients, and what a forward in training leaves in the buffers."""
    (y, gx, gradients), (their_y, their_gx, theirs) = run(pair.ours, x), run(pair.theirs, x)
    assert relative_l2(y, their_y) <= TOLERANCE and relative_l2(gx, their_gx) <= TOLERANCE
    assert gradients.keys() == theirs.keys()
    # Some vanish but for rounding: the keys' biases, and biases in front of batch statistics.
    scale = max(float(g.norm()) for g in theirs.values())
    for name, gradient in gradients.items():
        error = float((gradient - theirs[name]).norm())
        assert error <= TOLERANCE * float(theirs[name].norm()) + 1e-15 * scale, name
    buffers = dict(pair.theirs.named_buffers())
    for name, buffer in pair.ours.named_buffers():
        torch.testing.assert_close(buffer, buffers[name], rtol=TOLERANCE, atol=TOLERANCE)


def assert_breaks(pair, x, plant):
    """`plant` changes our model and returns the undoing: the logits show the change, and are right again after it."""
    with torch.no_grad():
        expected = pair.theirs(x)
        undo = plant(pair.ours)
        error = relative_l2(pair.ours(x), expected)
        undo()
        assert error > 100 * TOLERANCE
        assert relative_l2(pair.ours(x), expected) <= TOLERANCE
