"""Every peer on a tiny CvT; the suites of all families on the peers that need no exporter."""

from __future__ import annotations

import copy
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from fastvit_kernels.bench import gate
from fastvit_kernels.bench.cases import Case
from fastvit_kernels.bench.peers import PEERS, Unavailable
from fastvit_kernels.bench.results import OK, UNAVAILABLE, Row
from fastvit_kernels.bench.run import admit
from fastvit_kernels.bench.suites import SUITES, cmt, dhvt, pvt_v2
from fastvit_kernels.ops import dispatch, library
from fastvit_kernels.ops.global_attention.reference import reference
from fastvit_kernels.testing.numerics import relative_l2, to_fp64

QUICK = [(peer.name, variant) for peer in PEERS.values() for variant in peer.variants if "compile" not in peer.name]


@pytest.mark.parametrize(("name", "variant"), QUICK)
def test_peer_runs_within_the_rule(tiny: Case, name: str, variant: str) -> None:
    row, runner = admit(_row(tiny, name, variant), tiny, PEERS[name], threads=1)
    if (name, variant) == ("onnxruntime", "cast"):
        assert row.status == UNAVAILABLE and "bfloat16" in row.reason
    elif variant == "hint" and row.status == UNAVAILABLE:
        assert "on this processor" in row.reason
    else:
        assert row.status == OK, row.reason
        assert runner is not None
        # The second call must not depend on the first.
        again = gate.check(tiny, variant, runner(), ours=PEERS[name].ours)
        assert again.error == row.error


def test_compiled_peer_runs_within_the_rule(tinier: Case) -> None:
    # Once: the other compiled peers differ in options alone.
    row, runner = admit(_row(tinier, "compile", "fp32"), tinier, PEERS["compile"], threads=1)
    assert row.status == OK and runner is not None, row.reason


def _row(case: Case, name: str, variant: str) -> Row:
    dtype = "fp32" if variant == "fp32" else "bf16"
    return Row(case.suite, case.name, dtype, case.batch, name, variant, OK)


@pytest.mark.parametrize(("name", "package"), [("openvino", "openvino"), ("onnxruntime", "onnxruntime")])
def test_a_missing_package_is_the_reason(tiny: Case, name: str, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    row, runner = admit(_row(tiny, name, "fp32"), tiny, PEERS[name], threads=1)
    assert runner is None and row.status == UNAVAILABLE and package in row.reason


@pytest.mark.parametrize("name", ["sdpa", "transformers", "transformers+fastvit"])
def test_peers_without_a_counterpart_say_so(name: str) -> None:
    with pytest.raises(Unavailable, match="pointwise_mlp"):
        PEERS[name].prepare(SUITES["pointwise_mlp"](1)[0], "fp32", 1)


def test_sdpa_replaces_the_attention_while_it_runs(tiny: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    real = F.scaled_dot_product_attention

    def counted(*args, **kwargs):
        calls.append(kwargs["scale"])
        return real(*args, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", counted)
    sdpa, eager = (PEERS[name].prepare(tiny, "fp32", 1) for name in ("sdpa", "eager"))
    sdpa()
    # One block in the first stage, two in the second; CvT scales by its whole width.
    assert calls == [16**-0.5, 32**-0.5, 32**-0.5]
    eager()
    assert len(calls) == 3
    assert library.operators["global_attention"].reference is reference


def test_the_transformers_model_is_the_same_function(tiny: Case) -> None:
    assert tiny.twin is not None
    twin = tiny.twin(tiny.stock()).eval().double()
    found = twin(*to_fp64(tiny.inputs()))
    assert relative_l2(found, tiny.exact[0]) < 1e-12


def test_operator_suites_run_on_the_kernels() -> None:
    for suite in ("patch_embedding", "conv_projection", "global_attention", "pointwise_mlp"):
        _runs_on_the_kernels(SUITES[suite](1)[2])


# One of each kind, the smallest maps.
@pytest.mark.parametrize(
    ("suite", "names"),
    [
        (
            "depthwise_mlp",
            (
                "hat_net_tiny-stage4",
                "cmt_s-stage4",
                "dhvt_small_cifar_patch4",
                "mit_b0-stage4",
                "hat_net_medium-stage3",
                "cmt_ti-stage4",
                "pvt_v2_b2_li-stage4",
                "efficientformerv2_s0-stage4",
            ),
        ),
        (
            "query_attention",
            ("hat_net_tiny-stage3", "cmt_s-stage3", "dhvt_small_cifar_patch4", "mit_b0-stage3", "cmt_ti-stage3"),
        ),
        ("local_attention", ("hat_net_tiny-stage4", "twins_svt_small-stage4", "swin_tiny-stage4")),
        ("depthwise_conv", ("cmt_s-stage4", "cmt_s-stage3-keys", "cmt_ti-stage3-keys")),
        ("pooled_projection", ("hat_net_tiny-stage3",)),
        ("head_tokens", ("dhvt_small_cifar_patch4", "dhvt_tiny_domain_patch16")),
        ("patch_embedding", ("cmt_s-stage4", "mit_b0-stage3-keys", "mit_b0-stage4", "pvt_v2_b2_li-stage4-keys")),
    ],
)
def test_suites_of_several_families_run_on_the_kernels(suite: str, names: tuple[str, ...]) -> None:
    cases = {case.name: case for case in SUITES[suite](1)}
    for name in names:
        _runs_on_the_kernels(cases[name])


def _runs_on_the_kernels(case: Case) -> None:
    for variant in ("fp32", "autocast", "cast"):
        for peer in (PEERS["fastvit"], PEERS["sdpa"]) if case.attention else (PEERS["fastvit"],):
            row, _ = admit(_row(case, peer.name, variant), case, peer, threads=1)
            assert row.status == OK, row.reason
    packed: Any = case.fuse(case.stock())
    with dispatch.record(recorder := dispatch.Recorder()), torch.inference_mode():
        packed(*case.inputs())
    assert packed.packed.nbytes > 0
    assert [decision.chosen for decision in recorder.decisions] == ["cpu"]


# One of each kind: others differ from them in depth alone.
PYRAMIDS = ("pvt_v2_b0", "pvt_v2_b2", "pvt_v2_b2_li", "pvt_v2_b5", "mit_b0", "segformer_b0", "segformer_b2")
TINY_DEPTHS = {"depths": (1, 1, 1, 1), "num_classes": 10}


def _tiny_models() -> list[Case]:
    return [
        cmt.case("cmt_s", 1, side=64, **TINY_DEPTHS),
        dhvt.case("dhvt_small_imagenet_patch16", 1, side=64, depth=2, num_classes=10),
        *(pvt_v2.case(name, 1, 64, **TINY_DEPTHS) for name in PYRAMIDS),
    ]


def test_plain_models_and_ours_compute_the_same() -> None:
    for case in _tiny_models():
        for name in ("fastvit", "sdpa", "eager"):
            for variant in ("fp32", "autocast"):
                row, _ = admit(_row(case, name, variant), case, PEERS[name], threads=1)
                assert row.status == OK, (case.title, name, row.reason)


def test_transformers_pyramids_are_the_same_functions() -> None:
    twins = [case for case in _tiny_models() if case.twin is not None]
    assert [case.name for case in twins] == ["pvt_v2_b0", "pvt_v2_b2", "pvt_v2_b5", "mit_b0", "segformer_b0"]
    for case in twins:
        assert case.twin is not None
        twin = case.twin(case.stock()).eval()
        assert relative_l2(copy.deepcopy(twin).double()(*to_fp64(case.inputs())), case.exact[0]) < 1e-12
        row, _ = admit(_row(case, "transformers+fastvit", "fp32"), case, PEERS["transformers+fastvit"], threads=1)
        assert row.status == OK, row.reason


def test_sdpa_replaces_the_plain_models_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    real = F.scaled_dot_product_attention

    def counted(*args, **kwargs):
        calls.append(kwargs["attn_mask"])
        return real(*args, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", counted)
    case = cmt.case("cmt_s", 1, side=64, **TINY_DEPTHS)
    sdpa, eager = (PEERS[name].prepare(case, "fp32", 1) for name in ("sdpa", "eager"))
    eager()
    assert calls == []
    sdpa()
    assert len(calls) == 4 and all(table is not None for table in calls)


def test_activations_neither_vanish_nor_explode() -> None:
    """At the published depths: what a branch adds must count beside what it is added to, up to the last block."""
    cases = [
        *(cmt.case(name, 1, side=64) for name in cmt.MODELS),
        dhvt.case("dhvt_small_imagenet_patch16", 1, side=64),
        *(pvt_v2.case(name, 1, 64) for name in pvt_v2.MODELS),
    ]
    for case in cases:
        spreads = _spreads(model := case.stock())
        (image,) = case.inputs()
        with torch.inference_mode():
            logits, mirrored = model(image), model(image.flip(3))
        branches, blocks = (
            [value for kind, value in spreads if (kind == "block") is wanted] for wanted in (False, True)
        )
        assert min(branches) > 0.1 and max(blocks) < 20 * min(branches), case.title
        assert 0.1 < float(logits.std()) < 10 and relative_l2(mirrored, logits) > 0.01, case.title


def _spreads(model: Any) -> list[tuple[str, float]]:
    """Standard deviations of what blocks and their two branches return, filled when the model is called."""
    found: list[tuple[str, float]] = []
    for module in model.modules():
        if hasattr(module, "attn") and hasattr(module, "mlp"):
            for kind, part in (("block", module), ("attn", module.attn), ("mlp", module.mlp)):
                part.register_forward_hook(lambda _, inputs, out, kind=kind: found.append((kind, float(out.std()))))
    return found
