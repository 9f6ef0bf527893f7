"""What a run shows of itself: its log, progress, the expected duration, why no batch comes."""

import itertools
import logging
import multiprocessing
import time
from types import SimpleNamespace

import pytest

from flsl_d2.engine import gpus
from flsl_d2.engine import progress as module
from flsl_d2.engine.log_lines import start_log
from flsl_d2.engine.progress import FirstSteps, progress
from flsl_d2.errors import InputError

LOGGER = logging.getLogger("test_first_steps")


@pytest.fixture
def clock(monkeypatch) -> SimpleNamespace:
    """A clock that the test moves."""
    clock = SimpleNamespace(now=0.0, monotonic=lambda: clock.now)
    monkeypatch.setattr(module, "time", clock)
    return clock


def reported(items, clock, seconds, caplog) -> list[str]:
    """Return the lines of work whose items take so many seconds."""
    caplog.clear()
    caplog.set_level(logging.INFO, module.__name__)
    for _ in progress(items, "work"):
        clock.now += seconds
    return list(caplog.messages)


def test_first_line_comes_with_the_fifth_item_or_the_tenth_second(clock, caplog):
    fast = reported(range(40), clock, 0.5, caplog)
    assert fast[0].startswith("work: 5 of 40 done, 0.5 s each, 0:00:18 left")
    slow = reported(range(3), clock, 11.0, caplog)
    assert slow[0].startswith("work: 1 of 3 done")


def test_later_lines_are_at_most_a_minute_apart_and_few(clock, caplog):
    done = [int(line.split()[1]) for line in reported(range(3600), clock, 1.0, caplog)]
    assert done[0] == 5
    assert max(b - a for a, b in itertools.pairwise(done)) <= 60
    assert len(done) < 70


def test_a_log_that_nobody_reads_is_replaced_by_stderr(clock, capsys, monkeypatch, caplog):
    monkeypatch.setattr(module.logger, "hasHandlers", lambda: False)
    reported(iter(range(9)), clock, 11, caplog)
    assert "work: 1 done, 11 s each" in capsys.readouterr().err


def test_a_second_run_in_a_process_doubles_no_line_of_the_log(tmp_path, capsys):
    for run in ("a", "b", "b"):
        (tmp_path / run).mkdir(exist_ok=True)
        start_log(str(tmp_path / run), 0, ["test_lines"])
    logger = logging.getLogger("test_lines")
    logger.warning("is_fx_tracing will return true for both")
    logger.info("Cannot find the hook 'x', its state_dict is ignored.")
    logger.error("an error", exc_info=InputError("said elsewhere"))
    for part in ("Task: bbox", "AP,AP50", "12.3000,nan"):
        logger.info("copypaste: %s", part)
    logger.info("line")
    for text in (capsys.readouterr().out, (tmp_path / "b" / "log.txt").read_text()):
        lines = [line.partition("test_lines")[2].partition(": ")[2] for line in text.splitlines()]
        assert lines == ["bbox: AP 12.3000, AP50 nan", "line"]
    assert not (tmp_path / "a" / "log.txt").read_text()
    for handler in list(logger.handlers):
        logger.removeHandler(handler)


def test_progress_then_the_writers_lines_then_the_duration(caplog):
    caplog.set_level(logging.INFO)
    median = SimpleNamespace(median=lambda _: 2.0)
    storage = SimpleNamespace(history=lambda _: median)
    hook = FirstSteps(8, "pictures", LOGGER, log_period=6)
    hook.trainer = SimpleNamespace(start_iter=0, max_iter=100, storage=storage)
    hook.before_train()
    for hook.trainer.iter in range(20):
        hook.after_step()
    hook.after_train()
    steps, duration = caplog.messages
    assert steps.startswith("training: 5 of 100 done")
    assert duration.startswith("After 8 steps: 2 s a step, so 0:03:04 remain")


def test_a_first_batch_that_does_not_come_is_explained(caplog, monkeypatch):
    monkeypatch.setattr(module, "_PATIENCE_SECONDS", 0.1)
    worker = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
    worker.start()
    hook = FirstSteps(8, "pictures", LOGGER)
    hook.trainer = SimpleNamespace(start_iter=0, max_iter=100)
    hook.before_train()
    deadline = time.monotonic() + 30
    while not caplog.messages and time.monotonic() < deadline:
        time.sleep(0.02)
    worker.kill()
    worker.join()
    assert f"data worker {worker.pid} " in caplog.text
    assert __file__ in caplog.text


V1 = {"cpu/a/cpu.cfs_period_us": "100000"}


@pytest.mark.parametrize(
    ("group", "files", "cores"),
    [
        ("0::/job\n", {"job/cpu.max": "150000 100000"}, 1.5),
        ("0::/job\n", {"job/cpu.max": "max 100000", "cpu.max": "200000 100000"}, 2.0),
        ("0::/job\n", {"job/cpu.max": "max 100000"}, 0.0),
        ("0::/../other\n", {}, 0.0),
        ("4:memory:/a\n3:cpu,cpuacct:/a/b\n", {"cpu/a/cpu.cfs_quota_us": "50000", **V1}, 0.5),
        ("3:cpu:/a\n", {"cpu/a/cpu.cfs_quota_us": "-1", **V1}, 0.0),
    ],
)
def test_quota_of_control_groups(group, files, cores, tmp_path):
    (own := tmp_path / "own").write_text(group)
    for name, content in files.items():
        path = tmp_path / "root" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    assert gpus._cpu_quota(str(tmp_path / "root"), str(own)) == cores
