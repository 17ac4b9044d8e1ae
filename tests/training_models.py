"""One small model of each family, their batches, and one training step."""

from __future__ import annotations

import contextlib
import copy

import plain_cvt
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from fastvit_kernels import use_backend
from fastvit_kernels.models import create_model

PYRAMID = {"embed_dims": (8, 16, 24, 32), "num_heads": (1, 2, 3, 4), "depths": (1, 1, 1, 1)}
MODELS = {
    "cvt_13": {"embed_dims": (16, 24, 32), "num_heads": (1, 2, 2), "depths": (1, 1, 1), "drop_path_rate": 0.0},
    "hat_net_tiny": {
        "dims": (16, 16, 24, 32),
        "depths": (1, 1, 1, 1),
        "head_dim": 8,
        "expansions": (2, 2, 2, 2),
        "classifier_drop_rate": 0.0,
    },
    "cmt_xs": {**PYRAMID, "img_size": 64, "stem_channel": 8, "fc_dim": 32, "dp": 0.0, "drop_path_rate": 0.0},
    "pvt_v2_b0": {**PYRAMID, "drop_path_rate": 0.0},
    "mit_b0": {**PYRAMID, "drop_path_rate": 0.0},
    "dhvt_tiny_cifar_patch4": {"embed_dim": 32, "depth": 2, "num_heads": 2, "drop_path_rate": 0.0},
}
WITHOUT_BATCH_NORM = ("hat_net_tiny", "pvt_v2_b0", "mit_b0")
CLASSES = 5


def small(name, seed=0, **overrides):
    """The model in training mode, with weights so large that every layer matters."""
    torch.manual_seed(seed)
    return plain_cvt.randomize(create_model(name, CLASSES, **{**MODELS[name], **overrides})).train()


def batch(size=2, dtype=torch.float32, seed=1, side=64):
    """Images and labels. Batch norms on the last maps of smaller images see so few values that fp32 says little."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(size, 3, side, side, generator=generator, dtype=torch.float64).to(dtype)
    return x, torch.randint(CLASSES, (size,), generator=generator)


def gradients(model, x, y, forward=None, weight=1.0):
    """The loss and every parameter's gradient (None where there is none), added to what is there already."""
    logits = (forward or model)(x)
    loss = F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), y)
    (loss * weight).backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters()}


def on_reference(model, x, y, dtype=None):
    """`gradients` of a copy on the reference backend, in `dtype` if one is given."""
    twin = copy.deepcopy(model)
    with use_backend("reference"):
        return gradients(twin.to(dtype or x.dtype), x.to(dtype or x.dtype), y)


def assert_close(found, expected, tolerance=1e-4):
    """Gradients are close to the expected ones; those that vanish but for rounding are judged by the largest."""
    assert found.keys() == expected.keys()
    norms = {name: float(g.detach().norm()) for name, g in expected.items() if g is not None}
    vanishing = 0.01 * tolerance * max(norms.values())
    for name, want in expected.items():
        assert (found[name] is None) == (want is None), name
        if want is not None:
            error = float((found[name].detach().double() - want.detach().double()).norm())
            assert error <= tolerance * norms[name] + vanishing, (name, error, norms[name])


@contextlib.contextmanager
def fused_calls():
    """Names of the fused operators' backward kernels that run in the block, with the gradients asked of each."""
    calls = []

    class Listener(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.namespace == "fastvit" and func._opname.endswith("_backward"):
                calls.append((func._opname, list(args[2])))
            return func(*args, **(kwargs or {}))

    with Listener():
        yield calls
