"""Batch normalisation and an activation, in either order: what stands behind a stem's convolutions."""

from __future__ import annotations

import torch
from torch import Tensor

from fastvit_kernels.ops import library
from fastvit_kernels.ops.activations import ALL_ACTIVATIONS
from fastvit_kernels.ops.arguments import check_activation_tensor, check_flag, check_vectors, compute_dtype
from fastvit_kernels.ops.batch_norm import (
    BatchNorm,
    batch_norm_tensors,
    check_batch_norm,
)
from fastvit_kernels.ops.batch_norm_act import native
from fastvit_kernels.ops.batch_norm_act.reference import STATIC_SCHEMA, Static, batch_statistics, reference
from fastvit_kernels.ops.operator import Operator, Outputs, Tensors

__all__ = ["batch_norm_act"]


def _fake(tensors: Tensors, static: Static) -> Outputs:
    x = tensors[0]
    assert x is not None
    return (x.new_empty(x.shape, dtype=static.dtype),)


def _fake_statistics(tensors: Tensors, *static: object) -> Tensor:
    x = tensors[0]
    assert x is not None
    return x.new_empty((2, x.shape[2]), dtype=torch.float32)


OPERATOR = Operator(
    name="batch_norm_act",
    static=Static,
    static_schema=STATIC_SCHEMA,
    parameters=(1, 2, 3, 4),
    returns=1,
    reference=reference,
    fake=_fake,
    backends=[native.Cpu()],
)
library.register(OPERATOR)
library.define_statistics("batch_norm_act_statistics", STATIC_SCHEMA, _fake_statistics)


def batch_norm_act(
    x: Tensor,
    bn: BatchNorm,
    *,
    activation: str | None = None,
    bn_after_activation: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Batch normalisation and an activation of tokens or of a channels-last map's pixels.

    Equivalent plain PyTorch::

        maps = F.batch_norm(x.mT, bn.running_mean, bn.running_var, bn.weight, bn.bias, bn.training, ...)
        out = activation(maps).mT                      # bn_after_activation: F.batch_norm(activation(x.mT), ...).mT

    It keeps x alone for the gradients. On a GPU there are no kernels for it: PyTorch's own are the better choice there.

    Args:
        x: `[B, N, C]` tokens; fp64, fp32, bf16 or fp16.
        bn: the batch normalisation, with vectors `[C]` in fp32 or x's dtype. In training it normalises by the batch's
            statistics and updates the running ones as `nn.BatchNorm2d` does.
        activation: `"gelu"` (exact, erf), `"quick_gelu"`, `"silu"`, `"relu"` or None.
        bn_after_activation: the norm stands behind the activation, not in front of it.
        backend: runs this call on one backend; see `use_backend`.

    Returns:
        `[B, N, C]`, in x's dtype or autocast's.

    Raises:
        TypeError, ValueError: naming the argument, what came and what was expected.
        BackendError: the chosen backend cannot run the call.

    Source: Guo et al., "CMT: Convolutional Neural Networks Meet Vision Transformers", section 3.1 (its stem); Lu et
    al., "Bridging the Gap Between Vision Transformers and Convolutional Neural Networks on Small Datasets" (DHVT),
    section 3.2 (its patch embedding).
    """
    batch, tokens, channels = check_activation_tensor("x", x, 3).shape
    check_batch_norm("bn", bn)
    check_vectors(("bn.weight", "bn.bias", "bn.running_mean", "bn.running_var"), bn[:4], channels, x)
    if activation is not None and activation not in ALL_ACTIVATIONS:
        raise ValueError(f"activation: expected one of {', '.join(ALL_ACTIVATIONS)} or None, got {activation!r}")
    check_flag("bn_after_activation", bn_after_activation)
    static = Static(activation or "none", bn_after_activation, bn.eps, bn.training, compute_dtype(x))
    tensors = [x, *batch_norm_tensors(bn, channels, x)]
    if bn.training:
        library.take_batch_statistics(OPERATOR, tensors, 3, static, bn, batch * tokens, backend, batch_statistics)
    return library.call(OPERATOR, tensors, static, backend=backend)[0]
