"""Checkpoints against everything that can go wrong while they are written or kept."""

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from forked import ForkedJob
from torch import nn

from flsl_d2.errors import InputError
from flsl_d2.weights.checkpointer import (
    SafeCheckpointer,
    checkpoint_damage,
    checkpoint_files,
    remove_unfinished,
)


class State:
    def __init__(self, value: int) -> None:
        self.value = value

    def state_dict(self) -> dict:
        return {"value": self.value}

    def load_state_dict(self, state: dict) -> None:
        self.value = state["value"]


def checkpointer(folder: Path, value: int = 0) -> SafeCheckpointer:
    model = nn.Linear(3, 2)
    nn.init.constant_(model.weight, value)
    return SafeCheckpointer(model, str(folder), trainer=State(value))


def saved(folder: Path, *values: int) -> None:
    for value in values:
        checkpointer(folder, value).save(f"model_{value:07d}", iteration=value)
        os.utime(folder / f"model_{value:07d}.pth", (value, value))


def resumed(folder: Path) -> int:
    fresh = checkpointer(folder)
    fresh.resume_or_load("", resume=True)
    value = fresh.checkpointables["trainer"].value
    assert torch.equal(fresh.model.weight, torch.full((2, 3), float(value)))
    return value


def test_round_trip(tmp_path):
    assert not checkpointer(tmp_path).has_checkpoint()
    saved(tmp_path, 1, 2)
    assert (tmp_path / "last_checkpoint").read_text() == "model_0000002.pth"
    assert resumed(tmp_path) == 2
    assert {file.name for file in tmp_path.iterdir()} == {
        "last_checkpoint", "model_0000001.pth", "model_0000002.pth",
    }  # fmt: skip


@pytest.mark.parametrize("place", range(0, 100, 9))
def test_any_flipped_bit_is_noticed_or_harmless(place, tmp_path):
    saved(tmp_path, 1, 2)
    file = tmp_path / "model_0000002.pth"
    content = bytearray(file.read_bytes())
    content[len(content) * place // 100] ^= 16
    file.write_bytes(content)
    if checkpoint_damage(file):
        assert resumed(tmp_path) == 1
    else:  # padding between the tensors, or a date
        assert resumed(tmp_path) == 2


@pytest.mark.parametrize("damage", ["gone", "empty", "cut", "noise"])
def test_falls_back_aloud(damage, tmp_path, caplog):
    saved(tmp_path, 1, 2, 3)
    file = tmp_path / "model_0000003.pth"
    content = file.read_bytes()
    if damage == "gone":
        file.unlink()
    else:
        file.write_bytes({"empty": b"", "cut": content[:-50], "noise": b"\x00" * 999}[damage])
    assert resumed(tmp_path) == 2
    assert "model_0000003.pth is damaged or gone" in caplog.text
    assert "Falling back" in caplog.text


@pytest.mark.parametrize("tag", [None, "", "/", "model_0000002.pth\n", "\x00", "log.txt"])
def test_a_tag_that_is_lost_or_odd(tag, tmp_path):
    saved(tmp_path, 1, 2)
    (tmp_path / "last_checkpoint").unlink()
    if tag is not None:
        (tmp_path / "last_checkpoint").write_text(tag)
    assert resumed(tmp_path) == 2


def test_nothing_can_be_read(tmp_path):
    saved(tmp_path, 1)
    (tmp_path / "model_0000001.pth").write_bytes(b"PK")
    with pytest.raises(InputError, match=r"no checkpoint in .*model_0000001\.pth"):
        resumed(tmp_path)


def test_no_folder_is_no_checkpoint():
    assert checkpoint_files("") == []
    assert not SafeCheckpointer(nn.Linear(1, 1), "").has_checkpoint()


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EROFS])
@pytest.mark.parametrize("at", ["open", "write", "fsync", "replace"])
def test_a_failing_disk_leaves_the_last_good_one(at, error, tmp_path, monkeypatch):
    saved(tmp_path, 1)

    def fail(*_args, **_kwargs):
        raise OSError(error, os.strerror(error))

    if at == "write":

        class Full:
            def write(self, _data):
                fail()

            def flush(self):
                pass

        real = torch.save
        monkeypatch.setattr(torch, "save", lambda content, _: real(content, Full()))
    elif at == "open":
        monkeypatch.setattr(Path, "open", fail)
    else:
        monkeypatch.setattr(os, at, fail)
    with pytest.raises(OSError, match=os.strerror(error)):
        checkpointer(tmp_path, 2).save("model_0000002")
    monkeypatch.undo()
    assert not list(tmp_path.glob("*.part"))
    assert resumed(tmp_path) == 1


def test_killed_while_writing(tmp_path):
    target = tmp_path / "model_0000001.pth"
    target.write_bytes(b"good")
    script = tmp_path / "write.py"
    script.write_text(
        "import sys, time\nfrom flsl_d2.files import replaced_file\n"
        "with replaced_file(sys.argv[1]) as file:\n"
        "    file.write(b'half'); file.flush(); print('now', flush=True); time.sleep(100)\n"
    )
    command = [sys.executable, str(script), str(target)]
    process = ForkedJob(command, stdout=subprocess.PIPE, env={})
    assert process.stdout.readline() == "now\n"
    process.send_signal(signal.SIGKILL)
    process.wait(20)
    assert target.read_bytes() == b"good"
    assert len(list(tmp_path.glob("model_0000001.pth.*.part"))) == 1
    remove_unfinished(tmp_path)
    assert not list(tmp_path.glob("*.part"))
