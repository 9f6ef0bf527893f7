"""Benchmarks that run unattended: rows of all kinds, on stand-ins for the measurements."""

from __future__ import annotations

import json
import sys
from argparse import Namespace

import pytest

from pretrain.studies.benchmark.__main__ import main as benchmark
from pretrain.studies.benchmark.gpus import Row, benchmark_rows, run_rows

CONFIG = "configs/pretrain/flsl_vit_small_p16_in1k.py"
TINY = [
    *("views.global_size=64", "views.local_size=32"),
    *("model.backbone.embed_dim=24", "model.backbone.depth=1", "model.backbone.num_heads=1"),
    *("model.head.num_centroids=8", "model.head.hidden_dim=16", "model.head.bottleneck_dim=8"),
]


def stand_in(code: str, *arguments: str) -> tuple[str, ...]:
    return (sys.executable, "-S", "-c", f"import sys, json, time\n{code}", *arguments)


def measured(processes: int, speed: float) -> str:
    row = {"processes": processes, "images/s": speed, "peak GiB": None}
    content = {"machine": {"gpu": "X1", "date": "today"}, "rows": [row], "batch_size": 64}
    return f"open(sys.argv[-1], 'w').write({json.dumps(content)!r})"


def test_a_row_that_fails_is_a_row(tmp_path):
    rows = [
        Row("1 GPUs", stand_in(measured(1, 100.0), "processes")),
        Row("broken", stand_in("print('error: no memory', file=sys.stderr); sys.exit(2)")),
        Row("silent", stand_in("pass")),
        Row("endless", stand_in("time.sleep(60)")),
        Row("2 GPUs", stand_in(measured(2, 190.0), "processes")),
    ]
    results = run_rows(rows, tmp_path, seconds=3)
    assert [each["status"] for each in results] == [
        "ok",
        "status 2: error: no memory",
        "status 0: no output",
        "ended after 3 s",
        "ok",
    ]
    assert json.loads((tmp_path / "results.json").read_text()) == results
    table = (tmp_path / "results.md").read_text()
    assert "gpu X1, date today" in table
    assert "error: no memory" in table
    assert "190" in table
    assert (tmp_path / "speed.png").stat().st_size > 1000


@pytest.mark.parametrize(("gpus", "expected"), [(1, {1}), (4, {1, 2, 4}), (8, {1, 2, 4, 8})])
def test_rows_for_as_many_gpus_as_there_are(gpus, expected):
    rows = benchmark_rows("photos", gpus)
    several = [row for row in rows if "processes" in row.command]
    assert {int(row.name.split()[0]) for row in several} == expected
    started = {part for row in several for part in row.command if "nproc" in part}
    assert started == {f"--nproc-per-node={n}" for n in expected - {1}}
    assert len({row.name for row in rows}) == len(rows)


def test_every_row_is_a_command_that_exists(monkeypatch):
    """Each is parsed as the benchmark would parse it."""
    parsed: list[Namespace] = []
    monkeypatch.setattr(
        "pretrain.studies.benchmark.__main__.run_tool", lambda _, args: parsed.append(args)
    )
    for row in benchmark_rows("photos", 8, "reference.py"):
        place = row.command.index("pretrain.studies.benchmark")
        benchmark([*row.command[place + 1 :], "--json", "x.json"])
    assert len(parsed) == len(benchmark_rows("photos", 8))


def test_a_step_of_processes_is_measured(tmp_path, run_main):
    file = tmp_path / "row.json"
    options = ("--device", "cpu", "--batch-size", "2", "--repeats", "2", "--warmup", "1")
    status, out, _ = run_main(benchmark, "processes", *options, "--json", str(file), *TINY)
    assert status == 0, out
    content = json.loads(file.read_text())
    (row,) = content["rows"]
    assert row["processes"] == 1
    assert row["images/s"] == pytest.approx(2 / row["s/step"])
    assert 0 <= row["share of gradients"] < 1
    assert 0 < row["share of numbers"] < 1
