"""The suites under pytest-benchmark: `pytest bench --benchmark-only -k "cvt_13 and fp32 and not batch64"`.

Its statistics and storage (`--benchmark-save`, `--benchmark-compare`) suit following one peer over time. Peers are
timed here one after another: to compare them with each other use `fastvit-kernels bench`, which takes turns.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

from fastvit_kernels.bench import gate, memory
from fastvit_kernels.bench.cases import VARIANTS, Case
from fastvit_kernels.bench.peers import PEERS, Unavailable
from fastvit_kernels.bench.suites import BATCHES, SUITES

PARAMETERS = [
    pytest.param(suite, case.name, batch, dtype, peer.name, variant, id=f"{case.title}-{dtype}-batch{batch}-{label}")
    for suite in SUITES
    for batch in BATCHES
    for case in SUITES[suite](batch)
    for dtype, variants in VARIANTS.items()
    for peer in PEERS.values()
    if not peer.optional
    for variant in variants
    if variant in peer.variants
    for label in [peer.name if variant == dtype else f"{peer.name}-{variant}"]
]


@functools.lru_cache(maxsize=1)
def _case(suite: str, name: str, batch: int) -> Case:
    # One at a time: what a case remembers can be large.
    torch._dynamo.reset()
    return next(case for case in SUITES[suite](batch) if case.name == name)


@pytest.mark.parametrize(("suite", "name", "batch", "dtype", "peer", "variant"), PARAMETERS)
def test_suite(benchmark: Any, suite: str, name: str, batch: int, dtype: str, peer: str, variant: str) -> None:
    case = _case(suite, name, batch)
    if (shortage := memory.shortage(case)) is not None:
        pytest.skip(shortage)
    try:
        run = PEERS[peer].prepare(case, variant, torch.get_num_threads())
    except Unavailable as error:
        pytest.skip(str(error))
    verdict = gate.check(case, variant, run(), ours=PEERS[peer].ours)
    benchmark.group = f"{case.title} {dtype} batch {batch}"
    benchmark.extra_info |= {"error": verdict.error, "gflop": case.cost.flops / 1e9, "threads": torch.get_num_threads()}
    benchmark(run)
