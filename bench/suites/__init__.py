"""The suites: named lists of cases, the same for the command and for pytest."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from itertools import chain
from typing import Any, TypeVar

from fastvit_kernels.bench.cases import Case
from fastvit_kernels.bench.suites import (
    batch_norm_act,
    cmt,
    conv_projection,
    cvt,
    depthwise_conv,
    depthwise_mlp,
    dhvt,
    efficientformer_v2,
    global_attention,
    hat_net,
    head_tokens,
    local_attention,
    patch_embedding,
    pointwise_mlp,
    pooled_projection,
    pvt_v2,
    query_attention,
    twins,
    windows,
)
from fastvit_kernels.bench.suites.operators import Stage

Suite = Callable[[int], list[Case]]
Shape = TypeVar("Shape", bound=tuple[Any, ...])

BATCHES = (1, 8, 64)
"""The batch sizes that every suite is meant for; the last takes minutes and gigabytes for a whole model."""


def _distinct(*families: Iterable[Shape]) -> list[Shape]:
    """Every shape once: one that differs in its name alone from an earlier one goes by the earlier name."""
    found: dict[tuple[Any, ...], Shape] = {}
    for shape in chain(*families):
        found.setdefault(shape[1:], shape)
    return list(found.values())


def _of_cvt(case: Callable[[Stage, int], Case], batch: int) -> list[Case]:
    return [case(stage, batch) for stage in cvt.stages()]


def _local_attention(batch: int) -> list[Case]:
    shapes = [*windows.of_hat_net(), *windows.of_twins(), *windows.of_swin()]
    return [local_attention.case(shape, batch) for shape in shapes]


def _patch_embedding(batch: int) -> list[Case]:
    shapes = _distinct(cvt.embeddings(), cmt.embeddings(), pvt_v2.embeddings())
    return [patch_embedding.case(shape, batch) for shape in shapes]


def _query_attention(batch: int) -> list[Case]:
    families = (hat_net, cmt, dhvt, pvt_v2, twins)
    shapes = _distinct(*(family.attentions() for family in families))
    return [query_attention.case(shape, batch) for shape in shapes]


def _depthwise_conv(batch: int) -> list[Case]:
    return [depthwise_conv.case(shape, batch) for shape in _distinct(cmt.convolutions())]


def _pooled_projection(batch: int) -> list[Case]:
    return [pooled_projection.case(shape, batch) for shape in hat_net.poolings()]


def _batch_norm_act(batch: int) -> list[Case]:
    return [batch_norm_act.case(shape, batch) for shape in batch_norm_act.SHAPES]


def _head_tokens(batch: int) -> list[Case]:
    return [head_tokens.case(shape, batch) for shape in _distinct(dhvt.heads())]


def _depthwise_mlp(batch: int) -> list[Case]:
    families = (hat_net, cmt, dhvt, pvt_v2, efficientformer_v2)
    shapes = _distinct(*(family.mlps() for family in families))
    return [depthwise_mlp.case(shape, batch) for shape in shapes]


SUITES: dict[str, Suite] = {
    **{name: partial(family.cases, name) for family in (cvt, hat_net, cmt, dhvt, pvt_v2) for name in family.MODELS},
    "patch_embedding": _patch_embedding,
    "conv_projection": partial(_of_cvt, conv_projection.case),
    "global_attention": partial(_of_cvt, global_attention.case),
    "pointwise_mlp": partial(_of_cvt, pointwise_mlp.case),
    "local_attention": _local_attention,
    "query_attention": _query_attention,
    "depthwise_conv": _depthwise_conv,
    "depthwise_mlp": _depthwise_mlp,
    "pooled_projection": _pooled_projection,
    "head_tokens": _head_tokens,
    "batch_norm_act": _batch_norm_act,
}
"""Suite name -> the cases for a batch size. Cases build their modules and inputs when first asked for them."""
