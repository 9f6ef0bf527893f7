"""Jobs through submitit: its executor for one machine, and what Slurm would be given."""

from __future__ import annotations

import multiprocessing
import os
import signal
from pathlib import Path

import pytest
from test_runner import job, writes

from flsl_d2.errors import InputError
from flsl_d2.studies.cluster import Cluster
from flsl_d2.studies.runner import run_jobs

pytest.importorskip("submitit")


def local(folder: Path, *options: str) -> Cluster:
    return Cluster("local", folder, options, "cpu", 2, 1)


def test_jobs_end_fail_and_go_on_as_on_one_machine(tmp_path):
    flag = tmp_path / "repaired"
    good, bad = (
        job("good", writes(1.0)),
        job("bad", f"if not os.path.exists({str(flag)!r}): sys.exit('error: broken')\n{writes(2)}"),
    )
    after = job("after", writes(3.0), needs=good)
    records = run_jobs([good, bad, after], tmp_path, local(tmp_path))
    assert [records[j.key].status for j in (good, bad, after)] == ["done", "failed", "done"]
    assert records[bad.key].error == "broken"
    before = (tmp_path / "jobs" / good.key / "result.json").stat().st_mtime_ns
    flag.touch()
    records = run_jobs([good, bad, after], tmp_path, local(tmp_path))
    assert records[bad.key].outcome.values == {"x": 2}
    assert (tmp_path / "jobs" / good.key / "result.json").stat().st_mtime_ns == before


STOPPED = """
signal_seen = []
import signal
signal.signal(signal.SIGTERM, lambda *_: signal_seen.append(1))
(folder / 'pid').write_text(str(os.getpid()))
end = time.time() + 60
while not signal_seen and time.time() < end: time.sleep(0.02)
(folder / 'saved').touch()
sys.exit(75)
"""


def test_an_interrupted_run_asks_its_jobs_to_save(tmp_path):
    long = job("long", STOPPED)
    run = multiprocessing.get_context("fork").Process(
        target=lambda: run_jobs([long], tmp_path, local(tmp_path))
    )
    run.start()
    folder = tmp_path / "jobs" / long.key
    while not (folder / "pid").is_file():
        assert run.is_alive()
    os.kill(run.pid, signal.SIGTERM)
    run.join(60)
    assert (folder / "saved").is_file()
    assert '"interrupted"' in (folder / "result.json").read_text()


@pytest.mark.parametrize("option", ["slurm_partition", "no_such_parameter=1", "=x"])
def test_options_that_submitit_does_not_know_are_refused(tmp_path, option):
    with pytest.raises(InputError, match="cluster"):
        local(tmp_path, option)


def test_slurm_is_asked_for_gpus_time_and_a_signal_that_saves(tmp_path, monkeypatch):
    for command in ("srun", "sbatch"):
        (tmp_path / command).write_text("#!/bin/sh\n")
        (tmp_path / command).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    cluster = Cluster("slurm", tmp_path, ["slurm_partition=gpu", "timeout_min=90"], "cuda", 4, 4)
    text = cluster._executor._executor._make_submission_file_text("x", "0")
    for line in ("partition=gpu", "gpus-per-node=4", "time=90", "signal=USR1@90"):
        assert f"#SBATCH --{line}" in text
    monkeypatch.setenv("PATH", str(tmp_path / "none"))
    with pytest.raises(InputError, match="srun"):
        Cluster("slurm", tmp_path, [], "cpu", 1, 1)
