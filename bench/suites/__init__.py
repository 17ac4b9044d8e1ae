"""The suites: named lists of cases, the same for the command and for pytest."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from fastvit_kernels.bench.cases import Case
from fastvit_kernels.bench.suites import (
    cmt,
    conv_projection,
    cvt,
    depthwise_conv,
    depthwise_mlp,
    dhvt,
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

BATCHES = (1, 8, 64)
"""The batch sizes that every suite is meant for; the last takes minutes and gigabytes for a whole model."""


def _of_cvt(case: Callable[[Stage, int], Case], batch: int) -> list[Case]:
    return [case(stage, batch) for stage in cvt.stages()]


def _local_attention(batch: int) -> list[Case]:
    shapes = [*windows.of_hat_net(), *windows.of_twins(), *windows.of_swin()]
    return [local_attention.case(shape, batch) for shape in shapes]


def _patch_embedding(batch: int) -> list[Case]:
    shapes = [*cvt.embeddings(), *cmt.embeddings(), *pvt_v2.embeddings()]
    return [patch_embedding.case(shape, batch) for shape in shapes]


def _query_attention(batch: int) -> list[Case]:
    shapes = [*hat_net.attentions(), *cmt.attentions(), *dhvt.attentions(), *pvt_v2.attentions(), *twins.attentions()]
    return [query_attention.case(shape, batch) for shape in shapes]


def _depthwise_conv(batch: int) -> list[Case]:
    return [depthwise_conv.case(shape, batch) for shape in cmt.convolutions()]


def _pooled_projection(batch: int) -> list[Case]:
    return [pooled_projection.case(shape, batch) for shape in hat_net.poolings()]


def _head_tokens(batch: int) -> list[Case]:
    return [head_tokens.case(shape, batch) for shape in dhvt.heads()]


def _depthwise_mlp(batch: int) -> list[Case]:
    shapes = [*hat_net.mlps(), *cmt.mlps(), *dhvt.mlps(), *pvt_v2.mlps()]
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
}
"""Suite name -> the cases for a batch size. Cases build their modules and inputs when first asked for them."""
