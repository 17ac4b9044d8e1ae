"""The suites: named lists of cases, the same for the command and for pytest."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from fastvit_kernels.bench.cases import Case
from fastvit_kernels.bench.suites import (
    conv_projection,
    cvt,
    global_attention,
    hat_net,
    local_attention,
    patch_embedding,
    pointwise_mlp,
    query_attention,
)
from fastvit_kernels.bench.suites.operators import Stage

Suite = Callable[[int], list[Case]]


def _of_stages(case: Callable[[Stage, int], Case], batch: int) -> list[Case]:
    return [case(stage, batch) for stage in cvt.stages()]


def _of_hat_net(case: Callable[[hat_net.Stage, int], Case], two_levels_only: bool, batch: int) -> list[Case]:
    return [case(stage, batch) for stage in hat_net.stages() if stage.window > 1 or not two_levels_only]


SUITES: dict[str, Suite] = {
    **{name: partial(cvt.cases, name) for name in cvt.MODELS},
    "patch_embedding": partial(_of_stages, patch_embedding.case),
    "conv_projection": partial(_of_stages, conv_projection.case),
    "global_attention": partial(_of_stages, global_attention.case),
    "pointwise_mlp": partial(_of_stages, pointwise_mlp.case),
    **{name: partial(hat_net.cases, name) for name in hat_net.MODELS},
    "local_attention": partial(_of_hat_net, local_attention.case, False),
    "query_attention": partial(_of_hat_net, query_attention.case, True),
}
"""Suite name -> the cases for a batch size. Cases build their modules and inputs when first asked for them."""
