"""Benchmarks: operations, memory and turns with known answers, and whole commands."""

from __future__ import annotations

import json
from argparse import Namespace
from functools import partial
from pathlib import Path

import pytest
import torch
from omegaconf import DictConfig
from PIL import Image
from torch import nn

from flsl_d2.engine.config_files import load_lazy_config
from flsl_d2.errors import InputError
from pretrain.studies.benchmark.__main__ import main, overrides_of
from pretrain.studies.benchmark.gpus import benchmark_rows, run_rows
from pretrain.studies.benchmark.measuring import (
    Timing,
    reference_function,
    stored_for_backward,
    time_in_turn,
)
from pretrain.studies.benchmark.step import Step

CPU = torch.device("cpu")
CONFIG = "pretrain/flsl_vit_small_p16_in1k.py"
TINY = """
    views.global_size=64 views.local_size=32 model.backbone.patch_size=8 model.backbone.embed_dim=48
    model.backbone.depth=2 model.backbone.num_heads=2 model.head.num_centroids=64
    model.head.hidden_dim=32 model.head.bottleneck_dim=16
""".split()


def test_the_published_step_costs_what_was_counted_elsewhere():
    """ViT-S/16, views of 224, 224 and 2 x 96 pixels, windows of 2 tokens: 49.5 GFLOP an image."""
    options = ["views.global_window=2", "model.backbone.drop_path_rate=0"]
    full = Step(CONFIG, options, 1, CPU, "fp32").flops_per_image()
    # The count elsewhere was by a formula, with the gradient by the image, which nobody computes.
    assert full / 1e9 == pytest.approx(49.5, rel=0.02)


def test_ratios_are_of_rounds():
    """A machine that is slow for half of the time is slow for both sides."""
    reference = Timing(print, [2.0, 20.0, 2.0, 20.0, 20.0])
    ours = Timing(print, [1.0, 10.0, 1.0, 10.0, 1.0])
    assert ours.speed_against(reference) == 2
    assert reference.speed_against(reference) == 1


def test_stored_memory_of_a_known_case():
    layer = nn.Linear(64, 64)
    x = torch.randn(100, 64)
    # A linear layer keeps its input, a square its own.
    assert stored_for_backward(lambda: layer(x), layer) == 100 * 64 * 4
    assert stored_for_backward(lambda: layer(x).square(), layer) == 2 * 100 * 64 * 4
    with torch.no_grad():
        assert stored_for_backward(lambda: layer(x), layer) == 0


def test_functions_are_timed_in_turn():
    calls = []
    timings = time_in_turn(
        {name: lambda name=name: partial(calls.append, name) for name in "ab"}, 3, 1, CPU
    )
    assert calls == ["a", "b"] * 4
    assert [len(t.seconds) for t in timings.values()] == [3, 3]


class Gpu:
    """Memory of a GPU as ``torch.cuda`` reports it."""

    def __init__(self, monkeypatch) -> None:
        self.held = self.peak = 0
        for name in ("synchronize", "empty_cache"):
            monkeypatch.setattr(torch.cuda, name, lambda *_: None)
        monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", self.reset)
        monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: self.held)
        monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda _: self.peak)

    def reset(self, _) -> None:
        self.peak = self.held

    def hold(self, count: int) -> None:
        self.held += count
        self.peak = max(self.peak, self.held)
        if self.held > 100:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")


class Work:
    """Holds memory all along, and more while it runs."""

    def __init__(self, gpu: Gpu, own: int, more: int) -> None:
        self.gpu, self.own, self.more = gpu, own, more
        gpu.hold(own)

    def __call__(self) -> None:
        try:
            self.gpu.hold(self.more)
        finally:
            self.gpu.hold(-self.more)

    def __del__(self) -> None:
        self.gpu.hold(-self.own)


def test_memory_is_of_each_alone_and_what_does_not_fit_leaves_the_others_alone(monkeypatch):
    gpu = Gpu(monkeypatch)
    sizes = {"a": (20, 50), "large": (20, 90), "b": (10, 5)}
    makers = {name: partial(Work, gpu, *size) for name, size in sizes.items()}
    timings = time_in_turn(makers, 3, 1, torch.device("cuda"))
    assert {name: t.peak_bytes for name, t in timings.items()} == {"a": 70, "large": None, "b": 15}
    assert [len(t.seconds) for t in timings.values()] == [3, 0, 3]
    large = timings["large"]
    assert (large.peak_gib, large.median, large.rate(8)) == ("out of memory", None, None)
    assert large.speed_against(timings["a"]) is timings["a"].speed_against(large) is None


def test_variants_can_be_joined():
    cfg = load_lazy_config(CONFIG, overrides_of("eager+compiled+packed"))
    assert cfg.train.compile
    assert cfg.model.pack_views
    with pytest.raises(InputError, match="--variants has fast; known are"):
        overrides_of("eager+fast")


def test_reference_module(tmp_path):
    path = tmp_path / "theirs.py"
    path.write_text("def make_views(path):\n    return path\n")
    assert reference_function(str(path), "make_views")("x") == "x"
    for file, name in ((path, "make_step"), (tmp_path / "no.py", "make_views")):
        with pytest.raises(InputError, match=name):
            reference_function(str(file), name)


@pytest.fixture
def measure(tmp_path, run_main):
    """Run a benchmark on the CPU, and return what it writes."""

    def run(kind: str, *options: str) -> dict:
        file = tmp_path / "out.json"
        common = ("--device", "cpu", "--precision", "fp32", "--json", str(file))
        status, output, errors = run_main(main, kind, *common, *options)
        assert status == 0, output + errors
        return json.loads(file.read_text()) | {"output": output}

    return run


def test_the_tool_compares_and_writes(measure, tmp_path):
    reference = tmp_path / "theirs.py"
    reference.write_text(
        "import torch\n"
        "def make_step(batch_size, device, precision):\n"
        "    return lambda: torch.randn(100, 100) @ torch.randn(100, 100)\n"
    )
    options = "--repeats 2 --warmup 1 --batch-size 2 --reference-module".split()
    variants = ("--variants", "eager,packed,cropped on device")
    written = measure("pretrain-step", *options, str(reference), *variants, *TINY)
    assert "ratio to reference" in written["output"]
    steps = ["reference", "eager", "packed", "cropped on device"]
    assert [row["step"] for row in written["rows"]] == steps
    assert all(len(seconds) == 2 for seconds in written["seconds"].values())
    assert written["machine"]["torch"] == torch.__version__


def test_a_run_from_files_starts_and_ends_its_own_workers(measure, tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    for i in range(6):
        Image.new("RGB", (90, 70), (40 * i, 9, 99)).save(images / f"{i}.jpg")
    reference = tmp_path / "theirs.py"
    reference.write_text(
        "import multiprocessing, time\n"
        "def make_run(files, batch_size, workers, device, precision):\n"
        "    assert len(files) == 6 and not multiprocessing.active_children()\n"
        "    return lambda: time.sleep(0.01)\n"
    )
    options = "--repeats 2 --warmup 1 --rounds 1 --batch-size 2 --workers 1 --images".split()
    more = (str(images), "--reference-module", str(reference))
    rows = measure("end-to-end", *options, *more, *TINY)["rows"]
    assert [row["run"] for row in rows] == ["reference", "flsl_d2", "flsl_d2, a batch in memory"]
    assert [0 <= row["data wait"] < 1 for row in rows if row["data wait"] is not None] == [True]


FEW_PROPOSALS = """
    model.proposal_generator.post_nms_topk=[50,20] model.roi_heads.batch_size_per_image=16
    model.roi_heads.box_head.conv_dims=[32] model.roi_heads.mask_head.conv_dims=[32,32]
""".split()
ONCE = ("--repeats", "1", "--warmup", "0", "--batch-size")


def test_detectors_are_compared(measure, monkeypatch):
    def small(name: str, _: list[str]) -> DictConfig:
        return load_lazy_config(name, FEW_PROPOSALS)

    monkeypatch.setattr("pretrain.studies.benchmark.__main__.load_lazy_config", small)
    written = measure("detection", *ONCE, "1", "--model", "s", "--size", "64", "--rel-pos")
    rows = {row["what"]: row for row in written["rows"]}
    assert all(row["images/s"] > 0 for row in rows.values())
    kept = "GiB/image kept for backward"
    assert 0 < rows["flsl_d2, training"][kept] < rows["detectron2, training"][kept]


def test_growth_is_measured(measure, monkeypatch):
    growth = {"views.num_local": (0, 2)}
    monkeypatch.setattr("pretrain.studies.benchmark.__main__.GROWTH", growth)
    rows = measure("scaling", *ONCE, "2", "--batches", "2,3", *TINY)["rows"]
    assert [row["value"] for row in rows] == [2, 3, 0, 2]
    assert all(row["MiB kept for backward"] > 0 for row in rows)


def test_a_step_of_processes_is_measured(measure):
    (row,) = measure("processes", *ONCE, "2", *TINY)["rows"]
    assert row["images/s"] == pytest.approx(2 / row["s/step"])
    assert 0 <= row["share of gradients"] < 1
    assert 0 < row["share of numbers"] < 1


def stand_in(folder: Path, code: str) -> list[str]:
    file = folder / f"row_{len(list(folder.iterdir()))}.py"
    file.write_text(f"import sys, json, time\n{code}")
    return [file.stem]


def measured(processes: int, speed: float) -> str:
    row = {"processes": processes, "images/s": speed, "peak GiB": None}
    content = {"machine": {"gpu": "X1"}, "rows": [row], "batch_size": 64}
    return f"open(sys.argv[-1], 'w').write({json.dumps(content)!r})"


def test_a_row_that_fails_is_a_row(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    rows = {
        "1 GPUs": stand_in(tmp_path, measured(1, 100.0)),
        "broken": stand_in(tmp_path, "print('error: no memory', file=sys.stderr); sys.exit(2)"),
        "silent": stand_in(tmp_path, "pass"),
        "endless": stand_in(tmp_path, "time.sleep(60)"),
        "2 GPUs": stand_in(tmp_path, measured(2, 190.0)),
    }
    assert run_rows(rows, tmp_path / "out", seconds=4) == 3
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    results = {each["row"]: each for each in found}
    assert results["2 GPUs"]["result"]["rows"][0]["images/s"] == 190
    reasons = {"broken": "no memory", "silent": "results", "endless": "limit of 4 s"}
    assert all(reason in results[name]["status"] for name, reason in reasons.items())
    assert "no memory" in (tmp_path / "out" / "results.md").read_text()


@pytest.mark.parametrize("gpus", [1, 4, 8])
def test_rows_for_as_many_gpus_as_there_are_are_commands_that_exist(gpus, monkeypatch):
    parsed: list[Namespace] = []
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)
    monkeypatch.setattr(
        "pretrain.studies.benchmark.__main__.run_tool", lambda _, args: parsed.append(args)
    )
    rows = benchmark_rows("photos", gpus, "reference.py")
    for command in rows.values():
        start = command.index("pretrain.studies.benchmark") + 1
        main([*command[start:], "--json", "x.json"])
    assert len(parsed) == len(rows)
    several = {name for name, command in rows.items() if "processes" in command}
    assert {int(name.split()[0]) for name in several} == {n for n in (1, 2, 4, 8) if n <= gpus}
