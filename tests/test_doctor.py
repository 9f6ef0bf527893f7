"""The report about a machine: right states, remedies, and the exit status."""

from __future__ import annotations

import shutil
import sys
from collections import namedtuple

import torch

from flsl_d2 import doctor
from flsl_d2.engine import gpus


def _findings(check):
    return {finding.topic: finding for finding in check()}


def test_this_environment_is_in_place(capsys):
    assert doctor.main() == 0
    printed = capsys.readouterr().out
    assert torch.__version__.split("+")[0] in printed
    assert "Detectron2: " in printed
    assert "decoding: " in printed
    assert printed.endswith("Everything needed is in place.\n")


def test_a_failed_check_sets_the_status(monkeypatch, capsys):
    failing = doctor.Finding(doctor.FAIL, "GPU", "is broken")
    monkeypatch.setattr(doctor, "CHECKS", (lambda: iter([failing]),))
    assert doctor.main() == 1
    assert "FAIL  GPU: is broken" in capsys.readouterr().out


def test_gpus_that_cannot_be_used(monkeypatch):
    monkeypatch.setattr(gpus, "_driver", lambda: "550.54")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    found = _findings(doctor.check_gpus)["GPU"]
    assert found.state == doctor.FAIL
    assert "driver 580 or newer" in found.text
    monkeypatch.setattr(gpus, "_driver", lambda: None)
    assert _findings(doctor.check_gpus)["GPU"].state == doctor.NOTE


def test_an_old_card_is_named_with_what_it_lacks(monkeypatch):
    card = namedtuple("Card", "name total_memory major minor")("Tesla V100", 2**34, 7, 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: card)
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_75", "sm_90", "sm_120"])
    found = _findings(doctor.check_gpus)["GPU 0"]
    assert found.state == doctor.FAIL
    assert "Tesla V100, 16 GiB" in found.text
    assert "needs 7.5" in found.text


def test_little_shared_memory_is_a_failure(monkeypatch):
    usage = namedtuple("Usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(2**26, 0, 2**20))
    found = _findings(doctor.check_workers)["shared memory"]
    assert found.state == doctor.FAIL
    assert "--shm-size" in found.text


def test_a_missing_detectron2_is_a_finding_and_not_the_end(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "detectron2", None)
    assert doctor.main() == 1
    assert "FAIL  Detectron2" in (printed := capsys.readouterr().out)
    assert "install-detectron2" in printed
    assert "CPU cores" in printed
