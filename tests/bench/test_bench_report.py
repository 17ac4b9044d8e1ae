"""CSV files, tables, pictures, Markdown, and the command that makes them."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

import fastvit_kernels.bench
from fastvit_kernels.bench import cli, report, results, suites
from fastvit_kernels.bench.cases import Case
from fastvit_kernels.bench.peers import PEERS, Peer
from fastvit_kernels.bench.results import FAILED, OK, UNAVAILABLE, Conditions, Row
from fastvit_kernels.demo.errors import UserError

CONDITIONS = Conditions(
    cpu='Some(R) "CPU", 2.0',
    cores=2,
    threads=2,
    clock="wall",
    peak_gflops=236.4,
    copy_gbs=33.25,
    python="3.11.7",
    torch="2.13.0",
    onnxruntime="1.31.1",
    openvino="",
    transformers="5.23.0",
    fastvit_kernels="0.1.0",
    commit="0123456789ab",
    date="2026-01-02",
)


def _row(peer: str, p50: float | None, variant: str = "fp32", status: str = OK, reason: str = "") -> Row:
    row = Row("cvt_13", "cvt_13", "fp32" if variant == "fp32" else "bf16", 8, peer, variant, status, reason)
    row = replace(row, gflop=73.06, least_mb=80.5, floor_ms=309.0)
    if p50 is None:
        return row
    return replace(
        row,
        p20_ms=p50 - 1,
        p50_ms=p50,
        p80_ms=p50 + 2,
        min_ms=p50 - 3,
        rounds=30,
        calls=1,
        error=2.5e-7,
        error_allowed=1e-5,
        floor_multiple=p50 / 309.0,
    )


ROWS = [
    _row("eager", 600.0),
    _row("fastvit", 350.0),
    _row("openvino", None, status=UNAVAILABLE, reason='cannot be imported, "why" | unknown'),
    _row("onnxruntime", None, status=FAILED, reason="relative L2 error 1.00e-01, allowed 1.00e-05"),
    _row("eager", 500.0, "autocast"),
    _row("eager", 400.0, "cast"),
    _row("fastvit", 200.0, "autocast"),
]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "rows.csv"
    results.write(path, ROWS, CONDITIONS)
    return path


def test_csv_round_trip(file: Path) -> None:
    found = results.read(file)
    assert [conditions for _, conditions in found] == [CONDITIONS] * len(ROWS)
    for (row, _), written in zip(found, ROWS, strict=True):
        assert row.floor_multiple == (written.floor_multiple and pytest.approx(written.floor_multiple, rel=1e-5))
        assert replace(row, floor_multiple=None) == replace(written, floor_multiple=None)


def test_file_names_tell_the_condition() -> None:
    name = results.file_name("cvt_13", "inference", "fp32", 8, CONDITIONS)
    assert name == "cvt_13-infer-fp32-batch8-some-cpu-2-0-2threads.csv"
    assert results.file_name("cvt_13", "inference", "fp32", 8, replace(CONDITIONS, clock="cpu")) != name
    assert results.file_name("cvt_13", "training", "fp32", 8, CONDITIONS) == name.replace("infer", "train")


@pytest.mark.parametrize("content", [b"a,b\n1,2\n", b"\xff\xfe\x00", b"suite,case\nx\n"])
def test_other_files_are_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "other.csv"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"other\.csv: not a file of benchmark rows"):
        results.read(path)
    with pytest.raises(UserError, match=r"other\.csv"):
        cli.main(["report", str(path)])


def test_groups_and_speedups(file: Path) -> None:
    fp32, bf16 = report.groups(results.read(file))
    assert [row.label for row in fp32.ranked] == ["fastvit", "eager"]
    assert fp32.speedup(fp32.ranked[0]) == pytest.approx(600 / 350)
    # Against the faster of eager's two ways to bf16.
    assert [row.label for row in bf16.ranked] == ["fastvit (autocast)", "eager (cast)", "eager (autocast)"]
    assert bf16.speedup(bf16.ranked[0]) == pytest.approx(2.0)
    assert "236.4 GFLOP/s" in fp32.limits and "33.2 GB/s" in fp32.limits


def test_table_shows_times_and_reasons(file: Path) -> None:
    console = Console(file=io.StringIO(), width=80)
    for group in report.groups(results.read(file)):
        console.print(report.render(group))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    line = next(line for line in text.splitlines() if line.strip().startswith("fastvit") and "350" in line)
    assert line.split() == ["fastvit", "350", "349", "-", "352", "347", "1.13", "1.71x", "2.5e-07"]
    assert 'openvino unavailable: cannot be imported, "why" | unknown' in text
    assert "onnxruntime failed: relative L2 error 1.00e-01" in text


def test_markdown_is_a_table_per_condition(file: Path) -> None:
    text = report.markdown(report.groups(results.read(file)))
    assert "| **fastvit** | **350** | **349 - 352** | **347** | **1.13** | **1.71x** | **2.5e-07** |" in text
    assert "| eager | 600 |" in text and "- openvino unavailable" in text
    assert text.count("| peer |") == 2 and text.count("torch 2.13.0") == 1 and "commit 0123456789ab" in text


def test_report_command(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture, vector, fragment = tmp_path / "p.png", tmp_path / "new" / "p.svg", tmp_path / "m.md"
    assert cli.main(["report", str(file), "--plot", str(picture), "--markdown", str(fragment)]) == 0
    assert "1.71x" in capsys.readouterr().out
    assert picture.read_bytes().startswith(b"\x89PNG") and fragment.read_text().startswith("**cvt_13")
    assert cli.main(["report", str(file), str(file), "--plot", str(vector)]) == 0
    assert "<svg" in vector.read_text()
    with pytest.raises(UserError, match="png"):
        cli.main(["report", str(file), "--plot", "p.jpeg"])
    with pytest.raises(UserError, match="missing"):
        cli.main(["report", str(tmp_path / "missing.csv")])


def test_a_report_without_times_cannot_be_drawn(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no row has a time"):
        report.plot([report.Group(ROWS[2:4], CONDITIONS)], tmp_path / "p.png")


@pytest.fixture
def tiny_suite(tiny: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(suites.SUITES, "tiny", lambda batch: [tiny])


ARGUMENTS = ["--suite", "tiny", "--batch", "2", "--threads", "1", "--rounds", "2", "--seconds", "0"]


def test_run_command(tiny_suite: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [*ARGUMENTS, "--peers", "eager", "fastvit", "--output", str(tmp_path)]
    assert cli.main(arguments) == 0
    fp32, bf16 = sorted(tmp_path.glob("tiny-infer-*.csv"), key=lambda path: "bf16" in path.name)
    assert fp32.name.endswith("-1threads.csv") and "-batch2-" in fp32.name
    rows = results.read(fp32) + results.read(bf16)
    assert [(row.peer, row.variant) for row, _ in rows] == [
        ("eager", "fp32"),
        ("fastvit", "fp32"),
        ("eager", "autocast"),
        ("eager", "cast"),
        ("fastvit", "autocast"),
        ("fastvit", "cast"),
    ]
    for row, conditions in rows:
        assert row.status == OK and row.p20_ms is not None and row.min_ms is not None
        assert 0 < row.min_ms <= row.p20_ms and row.floor_multiple is not None and row.floor_multiple > 1
        assert conditions.threads == 1 and conditions.peak_gflops > 0 and conditions.torch
    assert "x floor" in capsys.readouterr().out


def test_run_command_fails_when_ours_is_wrong(
    tiny_suite: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = PEERS["fastvit"]

    def wrong(case: Case, variant: str, threads: int):
        run = real.prepare(case, variant, threads)
        return lambda: tuple(y * 1.001 for y in run())

    monkeypatch.setitem(PEERS, "fastvit", Peer("fastvit", real.variants, wrong, ours=True))
    arguments = [*ARGUMENTS, "--dtype", "fp32", "--peers", "eager", "fastvit", "--output", str(tmp_path)]
    assert cli.main(arguments) == 1
    out = capsys.readouterr().out
    assert "fastvit failed: relative L2 error 1.00e-03, allowed 1.00e-05" in " ".join(out.split())


@pytest.mark.parametrize(
    "arguments",
    [["--suite", "nothing"], ["--peers", "nobody"], ["--batch", "0"], ["--rounds", "x"], ["--seconds", "-1"]],
)
def test_bad_options_are_refused(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(arguments)
    assert stopped.value.code == 2


def test_an_unknown_case_is_refused(tiny_suite: None, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such case"):
        cli.main([*ARGUMENTS, "--case", "huge*", "--output", str(tmp_path)])


def test_list_names_everything(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--list"]) == 0
    out = capsys.readouterr().out
    for name in (*suites.SUITES, *PEERS, "cvt_w24-384-stage3"):
        assert name in out


def test_suites_run_under_pytest_benchmark(tmp_path: Path) -> None:
    directory = Path(next(iter(fastvit_kernels.bench.__path__)))
    saved = tmp_path / "saved.json"
    options = ["--benchmark-only", f"--benchmark-json={saved}", "--benchmark-max-time=0.01", "--benchmark-warmup=off"]
    chosen = "pointwise_mlp and stage3-fp32-batch1-fastvit and 224"
    # Under pytest-xdist, as the tests themselves run, nothing would be timed.
    plain = ["-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    command = [sys.executable, "-m", "pytest", *plain, str(directory), *options, "-k", chosen]
    done = subprocess.run(command, capture_output=True, text=True, cwd=directory.parent, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert '"gflop"' in saved.read_text()
