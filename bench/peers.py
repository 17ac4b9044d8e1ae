"""Against whom we measure: every way to run a stock module that its users have today, and ours."""

from __future__ import annotations

import importlib
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fastvit_kernels.bench.cases import VARIANTS, Case, Outputs, as_outputs, as_user_has_it, inference
from fastvit_kernels.bench.sdpa import sdpa_attention

Runner = Callable[[], Outputs]
Prepare = Callable[[Case, str, int], Runner]

FP32, AUTOCAST, CAST, HINT = VARIANTS["fp32"] + VARIANTS["bf16"]


class Unavailable(Exception):
    """A peer cannot run here; the message says why."""


@dataclass(frozen=True)
class Peer:
    """One way to run a case.

    Attributes:
        name: as the command line and the tables call it.
        variants: the ways it has to reach a dtype.
        prepare: `(case, variant, threads)` -> a function that runs the case once and returns its results.
        ours: runs on the fused kernels.
        optional: measured only when asked for by name.
    """

    name: str
    variants: tuple[str, ...]
    prepare: Prepare
    ours: bool = False
    optional: bool = False


def _runner(module: Callable[..., Any], case: Case, variant: str) -> Runner:
    inputs = case.inputs(variant)

    def run() -> Outputs:
        with inference(variant):
            return as_outputs(module(*inputs))

    return run


def _eager(case: Case, variant: str, threads: int) -> Runner:
    return _runner(case.stock(variant), case, variant)


def _sdpa(case: Case, variant: str, threads: int) -> Runner:
    if not case.attention:
        raise Unavailable(f"{case.suite} has no attention that it could replace")
    stock = _eager(case, variant, threads)

    def run() -> Outputs:
        with sdpa_attention():
            return stock()

    return run


def _compile(**options: Any) -> Prepare:
    def prepare(case: Case, variant: str, threads: int) -> Runner:
        # fullgraph: a graph break, or a fall back to eager after too many compilations, must not pass as a result.
        return _runner(torch.compile(case.stock(variant), fullgraph=True, **options), case, variant)

    return prepare


def _fastvit(case: Case, variant: str, threads: int) -> Runner:
    return _runner(case.fuse(case.stock(variant)), case, variant)


def _twin(case: Case, variant: str) -> nn.Module:
    _require("transformers")
    if case.twin is None:
        raise Unavailable(f"transformers has no counterpart of {case.suite}")
    return as_user_has_it(case.twin(case.stock()).eval(), variant)


def _transformers(case: Case, variant: str, threads: int) -> Runner:
    return _runner(_twin(case, variant), case, variant)


def _fastvit_in_transformers(case: Case, variant: str, threads: int) -> Runner:
    return _runner(case.fuse(_twin(case, variant)), case, variant)


def _require(package: str) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise Unavailable(f"{package} cannot be imported: {error}") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporters' remarks on packages that nothing here needs."""
    previous = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(previous)


def _onnx(case: Case, variant: str) -> bytes:
    """The stock module as a serialised ONNX model."""
    _require("onnxscript")

    def export() -> bytes:
        with _quiet(), inference(FP32):
            program = torch.onnx.export(case.stock(variant), case.inputs(variant), dynamo=True, verbose=False)
        assert program is not None
        return bytes(program.model_proto.SerializeToString())

    return case.remember(("onnx", variant), export)


def _onnxruntime(case: Case, variant: str, threads: int) -> Runner:
    ort = _require("onnxruntime")
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.log_severity_level = 4
    session = ort.InferenceSession(_onnx(case, variant), options, providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]
    feeds = {name: x.numpy() for name, x in zip(names, case.inputs(variant), strict=True)}

    def run() -> Outputs:
        return tuple(torch.from_numpy(out) for out in session.run(None, feeds))

    return run


def _openvino(case: Case, variant: str, threads: int) -> Runner:
    openvino = _require("openvino")
    precision = "bf16" if variant == HINT else "f32"
    core = openvino.Core()
    settings = {
        "INFERENCE_PRECISION_HINT": precision,
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": threads,
    }
    compiled = core.compile_model(core.read_model(_onnx(case, FP32)), "CPU", settings)
    used = compiled.get_property("INFERENCE_PRECISION_HINT").to_string()
    if used != precision:
        raise Unavailable(f"asked for {precision}, OpenVINO would compute in {used} on this processor")
    request = compiled.create_infer_request()
    feeds = {index: x.numpy() for index, x in enumerate(case.inputs(FP32))}
    outputs = range(len(compiled.outputs))

    def run() -> Outputs:
        found = request.infer(feeds, share_inputs=True, share_outputs=True)
        return tuple(torch.from_numpy(found[index]) for index in outputs)

    return run


_EAGER = (FP32, AUTOCAST, CAST)

PEERS = {
    peer.name: peer
    for peer in (
        Peer("eager", _EAGER, _eager),
        Peer("sdpa", _EAGER, _sdpa),
        Peer("transformers", _EAGER, _transformers),
        Peer("compile", _EAGER, _compile()),
        Peer("compile-freezing", _EAGER, _compile(options={"freezing": True}), optional=True),
        Peer("compile-max-autotune", _EAGER, _compile(mode="max-autotune"), optional=True),
        # The CPU execution provider is offered the bf16 model; its own words say what it lacks.
        Peer("onnxruntime", (FP32, CAST), _onnxruntime),
        Peer("openvino", (FP32, HINT), _openvino),
        Peer("fastvit", _EAGER, _fastvit, ours=True),
        Peer("transformers+fastvit", _EAGER, _fastvit_in_transformers, ours=True),
    )
}
