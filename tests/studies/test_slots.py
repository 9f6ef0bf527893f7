"""Which job gets which GPU."""

from __future__ import annotations

import pytest
import torch

from flsl_d2.errors import InputError
from flsl_d2.studies.jobs import make_slots


@pytest.mark.parametrize(
    ("visible", "num_gpus", "each", "shares"),
    [
        (None, 4, 1, ["0", "1", "2", "3"]),
        (None, 4, 2, ["0,1", "2,3"]),
        (None, 3, 2, ["0,1"]),
        ("5,7,1,2", 2, 1, ["5", "7"]),
        ("GPU-a,GPU-b,GPU-c,GPU-d", 4, 4, ["GPU-a,GPU-b,GPU-c,GPU-d"]),
    ],
)
def test_each_job_has_gpus_of_its_own(monkeypatch, visible, num_gpus, each, shares):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    slots = make_slots("cuda", num_gpus, each)
    assert [slot.environment["CUDA_VISIBLE_DEVICES"] for slot in slots] == shares
    assert all(slot.num_processes == each for slot in slots)


def test_cpu_jobs_share_the_cores(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("flsl_d2.studies.jobs.usable_cores", lambda: 8)
    assert [slot.environment for slot in make_slots("cpu", 2)] == [{"OMP_NUM_THREADS": "4"}] * 2
    assert [slot.environment for slot in make_slots("cpu", 1)] == [{}]


@pytest.mark.parametrize(("num_gpus", "each"), [(0, 1), (1, 2), (1, 0), (5, 1)])
def test_what_is_not_there_is_refused(monkeypatch, num_gpus, each):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    with pytest.raises(InputError, match="GPU"):
        make_slots("cuda", num_gpus, each)
