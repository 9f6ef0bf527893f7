"""Files that are whole or not there, and folders that are tried beforehand."""

import errno
import os
from pathlib import Path

import pytest

from flsl_d2.errors import InputError, MachineError
from flsl_d2.files import (
    OutputNames,
    expand_home,
    machine_errors,
    replaced_file,
    writable_folder,
    write_text,
)
from tests.hostile import HOSTILE, SURROGATES


def test_readers_never_see_half(tmp_path: Path) -> None:
    target = tmp_path / "file"
    target.write_bytes(b"a" * 100)
    with replaced_file(target) as file:
        file.write(b"b" * 50)
        file.flush()
        assert target.read_bytes() == b"a" * 100
    assert target.read_bytes() == b"b" * 50


def test_a_failure_leaves_what_was_there(tmp_path: Path) -> None:
    target = tmp_path / "file"
    target.write_bytes(b"before")
    with pytest.raises(TypeError), replaced_file(target) as file:
        file.write("no bytes")
    assert [each.name for each in tmp_path.iterdir()] == ["file"]
    assert target.read_bytes() == b"before"


def test_text_makes_its_folders(tmp_path: Path) -> None:
    write_text(tmp_path / "a" / "b" / "text", "größer\n")
    assert (tmp_path / "a" / "b" / "text").read_bytes() == "größer\n".encode()


@pytest.mark.parametrize("path", ["/proc/no", "file/below"])
def test_a_folder_is_made_or_refused(tmp_path: Path, monkeypatch, path: str) -> None:
    assert writable_folder(tmp_path / "a" / "b") == tmp_path / "a" / "b"
    assert not list((tmp_path / "a" / "b").iterdir())
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=f"^'{path}' cannot be written"):
        writable_folder(path)
    with pytest.raises(InputError, match=f"^--output is '{path}', which cannot be written"):
        writable_folder(path, "--output")


def test_processes_that_write_one_path_at_once(tmp_path: Path) -> None:
    target = tmp_path / "file"
    with replaced_file(target) as first, replaced_file(target) as second:
        first.write(b"first")
        second.write(b"second")
    assert target.read_bytes() == b"first"  # the one that finished last
    assert [each.name for each in tmp_path.iterdir()] == ["file"]


def test_the_home_folder_is_put_in_wherever_a_shell_does_not(monkeypatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert expand_home("~/a") == expand_home("/home/me/a") == "/home/me/a"
    assert expand_home(Path("~/a")) == Path("/home/me/a")
    assert expand_home(["x=~/a", "~", 3]) == ["x=/home/me/a", "/home/me", 3]
    assert expand_home("a~b/~") == "a~b/~"
    assert expand_home(None) is None


def test_names_of_outputs_are_unique_and_fit_for_any_system():
    names = OutputNames()
    stems = [*HOSTILE, *SURROGATES, "front", "Front", "front", ".", "", "x" * 300]
    found = [names.free(stem, ".png") for stem in stems]
    assert len({name.casefold() for name in found}) == len(found)
    assert all(name.isprintable() and len(name.encode()) <= 200 for name in found)
    assert not any(mark in name for name in found for mark in '/\\:*?"<>|')
    assert names.free("front", ".mp4") == "front"  # another file


@pytest.mark.parametrize("code", [errno.EMFILE, errno.EACCES, errno.EIO, errno.ESTALE])
def test_errors_of_the_machine_are_told_from_those_of_a_file(code):
    with pytest.raises(MachineError, match="says nothing about its content"), machine_errors("a"):
        raise OSError(code, os.strerror(code))
    with pytest.raises(OSError, match="No such file"), machine_errors("a"):
        raise OSError(errno.ENOENT, os.strerror(errno.ENOENT))
