"""Running jobs: resumed, retried, interrupted, two at a time; with small commands of our own."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest

from flsl_d2.errors import InputError
from flsl_d2.studies.jobs import Job, Outcome, read_record
from flsl_d2.studies.machine import Machine
from flsl_d2.studies.runner import run_jobs

ONE = Machine()


def job(name: str, code: str, needs: Job | None = None, **settings) -> Job:
    """Run Python code in which ``folder`` is the job's; it writes numbers to values.json."""
    start = f"import json, os, sys, time, pathlib; name = {name!r}; "

    def command(folder: Path, _num_processes: int) -> list[str]:
        return ["-c", f"{start}folder = pathlib.Path({str(folder)!r})\n{code}"]

    def outcome(folder: Path) -> Outcome:
        return Outcome(**json.loads((folder / "values.json").read_text()))

    return Job("test", name, {"name": name, **settings}, command, outcome, needs)


def writes(value: float) -> str:
    return f"(folder / 'values.json').write_text(json.dumps({{'values': {{'x': {value}}}}}))"


def test_done_jobs_stay_and_failed_ones_are_tried_again(tmp_path, capsys):
    flag = tmp_path / "repaired"
    good = job("good", writes(1.0))
    bad = job(
        "bad", f"if not os.path.exists({str(flag)!r}): sys.exit('error: broken')\n{writes(2)}"
    )
    after = job("after", writes(3.0), needs=bad)
    records = run_jobs([good, bad, after], tmp_path / "out", ONE)
    assert records[good.key].status == "done"
    assert records[good.key].outcome.values == {"x": 1.0}
    assert records[bad.key].error == "broken"
    assert records[after.key].error == "not run, because its test failed: broken"
    assert not (tmp_path / "out" / "jobs" / after.key).exists()
    before = (tmp_path / "out" / "jobs" / good.key / "result.json").stat().st_mtime_ns
    flag.touch()
    records = run_jobs([good, bad, after], tmp_path / "out", ONE)
    assert [records[j.key].status for j in (good, bad, after)] == ["done"] * 3
    assert (tmp_path / "out" / "jobs" / good.key / "result.json").stat().st_mtime_ns == before
    assert "1 of 3 jobs are done already" in capsys.readouterr().out


def test_settings_decide_what_is_the_same_job(tmp_path):
    count = "(folder / 'runs').open('a').write('x')\n" + writes(1.0)
    one, same, other = job("a", count), job("a", count), job("a", count, seed=1)
    assert one.key == same.key != other.key
    run_jobs([one, same, other], tmp_path, ONE)
    run_jobs([other], tmp_path, ONE)
    assert [(tmp_path / "jobs" / j.key / "runs").read_text() for j in (one, other)] == ["x", "x"]
    (tmp_path / "jobs" / one.key / "result.json").write_text('{"status": "do')
    assert run_jobs([one], tmp_path, ONE)[one.key].status == "done", "a damaged record"


@pytest.mark.parametrize(
    ("code", "says"),
    [
        ("raise ValueError('a bad value')", "ValueError: a bad value (exit status 1)"),
        ("sys.exit(3)", "exit status 3"),
        ("os.kill(os.getpid(), 9)", "ended by signal 9"),
        ("pass", "its results cannot be read"),
        ("(folder / 'values.json').write_text('{')", "its results cannot be read"),
        ("print('error: first'); print('second'); sys.exit(2)", "first second"),
        (
            "(folder / 'values.json').write_text(json.dumps("
            "{'values': {'x': 1}, 'failures': {'y': 'no masks'}}))",
            "y: no masks",
        ),
    ],
)
def test_why_a_job_failed_is_told(tmp_path, code, says):
    one = job("a", code)
    record = run_jobs([one], tmp_path, ONE)[one.key]
    assert record.status == "failed"
    assert says in record.error
    assert read_record(tmp_path / "jobs" / one.key) == record


def test_an_error_of_an_earlier_attempt_is_not_told_again(tmp_path):
    first = (
        "marker = folder / 'tried'\n"
        "if not marker.exists(): marker.touch(); sys.exit('error: the first')\n"
        "sys.exit(5)"
    )
    one = job("a", first)
    assert run_jobs([one], tmp_path, ONE)[one.key].error == "the first"
    assert run_jobs([one], tmp_path, ONE)[one.key].error == "exit status 5"


def test_a_command_that_cannot_be_made_is_a_failure_of_its_job(tmp_path):
    def refuse(_folder: Path, _num_processes: int) -> list[str]:
        raise InputError("the weights are damaged; download them again.")

    bad = Job("test", "bad", {"bad": 1}, refuse, lambda folder: Outcome())
    good = job("good", writes(1.0))
    records = run_jobs([bad, good], tmp_path, ONE)
    assert records[bad.key].error == "the weights are damaged; download them again."
    assert records[good.key].status == "done"


def test_two_slots_run_two_jobs_at_a_time_each_in_its_environment(tmp_path):
    # Each waits for the other: one after the other, both would fail.
    code = (
        "(folder.parent / f'{name}.here').touch()\n"
        "other = folder.parent / {'a': 'b.here', 'b': 'a.here'}[name]\n"
        "end = time.time() + 200\n"
        "while not other.exists() and time.time() < end: time.sleep(0.02)\n"
        "assert other.exists()\n"
        "(folder / 'values.json').write_text("
        "json.dumps({'values': {'x': int(os.environ['CUDA_VISIBLE_DEVICES'])}}))"
    )
    two = Machine("cpu", 2)
    two.shares = [{"CUDA_VISIBLE_DEVICES": "0"}, {"CUDA_VISIBLE_DEVICES": "1"}]
    records = run_jobs([job("a", code), job("b", code)], tmp_path, two)
    assert sorted(r.outcome.values["x"] for r in records.values()) == [0, 1]


SLEEPER = (
    "import subprocess\n"
    "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
    "(folder / 'pids').write_text(f'{os.getpid()} {child.pid}')\n"
    "time.sleep(60)"
)


def start_and_wait_for_the_second(output: Path) -> tuple[multiprocessing.Process, list[int]]:
    jobs = [job("quick", writes(1.0)), job("slow", SLEEPER)]
    # Forked, because importing PyTorch again takes seconds.
    process = multiprocessing.get_context("fork").Process(target=run_jobs, args=(jobs, output, ONE))
    process.start()
    end = time.monotonic() + 60
    while time.monotonic() < end:
        found = [file.read_text() for file in output.glob("jobs/*/pids")]
        if found and len(found[0].split()) == 2:
            return process, [int(pid) for pid in found[0].split()]
        time.sleep(0.05)
    process.kill()
    raise AssertionError("the second job did not start")


def ended(pid: int) -> bool:
    for _ in range(1200):  # a minute
        try:
            os.kill(pid, 0)
            if Path(f"/proc/{pid}/stat").read_text().split()[2] == "Z":
                return True
        except (ProcessLookupError, FileNotFoundError):
            return True
        time.sleep(0.05)
    return False


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_stops_its_children_and_goes_on_later(tmp_path, number):
    process, pids = start_and_wait_for_the_second(tmp_path)
    os.kill(process.pid, number)
    process.join(30)
    assert process.exitcode == 1
    assert all(ended(pid) for pid in pids)
    slow = job("slow", writes(2.0))
    assert read_record(tmp_path / "jobs" / slow.key).status == "interrupted"
    records = run_jobs([job("quick", "sys.exit(1)"), slow], tmp_path, ONE)
    assert sorted(r.outcome.values["x"] for r in records.values()) == [1.0, 2.0]


def test_a_job_left_behind_by_a_killed_run_keeps_others_out(tmp_path):
    process, pids = start_and_wait_for_the_second(tmp_path)
    with pytest.raises(InputError, match="another process"):
        run_jobs([job("quick", writes(1.0))], tmp_path, ONE)
    process.kill()
    process.join()
    with pytest.raises(InputError, match="a job that one left behind"):
        run_jobs([job("quick", writes(1.0))], tmp_path, ONE)
    os.killpg(pids[0], signal.SIGKILL)
    assert all(ended(pid) for pid in pids)
    run_jobs([job("quick", writes(1.0))], tmp_path, ONE)


@pytest.mark.parametrize(
    ("visible", "num_gpus", "each", "shares"),
    [
        ("", 4, 2, ["0,1", "2,3"]),
        ("", 3, 2, ["0,1"]),
        ("GPU-a,7,1,2", 2, 1, ["GPU-a", "7"]),
    ],
)
def test_each_job_has_gpus_of_its_own(monkeypatch, visible, num_gpus, each, shares):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    machine = Machine("cuda", num_gpus, each)
    assert [share["CUDA_VISIBLE_DEVICES"] for share in machine.shares] == shares
    assert (machine.num_processes, machine.width) == (each, len(shares))
    for counts in ((0, 1), (1, 2), (1, 0), (5, 1)):
        with pytest.raises(InputError, match=r"GPU|num-gpus"):
            Machine("cuda", *counts)


def test_cpu_jobs_share_the_cores(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("flsl_d2.studies.machine.usable_cores", lambda: 8)
    assert Machine("cpu", 2).shares == [{"OMP_NUM_THREADS": "4"}] * 2
    assert Machine("cpu", 1).shares == [{}]
