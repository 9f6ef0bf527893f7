"""Reading weight files: what is data loads, what is not is refused in one sentence."""

import argparse
import os
import pickle
import re
from collections import Counter, OrderedDict, defaultdict
from pathlib import Path, PurePosixPath

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from flsl_d2.errors import InputError
from flsl_d2.weights import read_weights
from flsl_d2.weights.reading import split_weights_path


class Foreign:
    """Something that an unpickler would have to import."""

    def __reduce__(self):
        return (os.mkdir, ("ran",))


def refusal(path) -> str:
    with pytest.raises(InputError) as error:
        read_weights(str(path))
    text = str(error.value)
    assert "\n" not in text
    assert str(path) in text
    return text


def test_reads_tensors_and_plain_options(tmp_path):
    path = tmp_path / "a.pth"
    content = {"model": {"w": torch.ones(2)}, "args": argparse.Namespace(lr=0.1), "epoch": 3}
    torch.save(content, path)
    got = read_weights(str(path))
    assert torch.equal(got["model"]["w"], torch.ones(2))
    assert (got["args"].lr, got["epoch"]) == (0.1, 3)


def test_plain_options_are_allowed_while_reading_only(tmp_path):
    path = tmp_path / "a.pth"
    torch.save({"args": argparse.Namespace(lr=0.1)}, path)
    read_weights(str(path))
    assert argparse.Namespace not in torch.serialization.get_safe_globals()


def test_reads_safetensors(tmp_path):
    path = tmp_path / "a.safetensors"
    save_file({"w": torch.arange(3.0)}, path)
    assert torch.equal(read_weights(str(path))["w"], torch.arange(3.0))


@pytest.mark.parametrize("zipped", [True, False])
def test_foreign_classes_are_named_and_do_not_run(tmp_path, monkeypatch, zipped):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "a.pth"
    torch.save({"x": Foreign()}, path, _use_new_zipfile_serialization=zipped)
    assert "posix.mkdir" in refusal(path)
    assert not Path("ran").exists()


def test_missing_empty_and_folder(tmp_path):
    assert "do not exist" in refusal(tmp_path / "none.pth")
    assert "a folder" in refusal(tmp_path)
    for name in ("a.pth", "b.safetensors", "c.pkl"):
        (tmp_path / name).write_bytes(b"")
        assert "empty" in refusal(tmp_path / name)


@pytest.mark.parametrize("suffix", ["pth", "safetensors", "pkl"])
@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "a pointer of Git LFS"),
        (b"\n<!DOCTYPE html><html>", "a web page"),
        (b"\x1f\x8b\x08\x00", "compressed by gzip"),
        (b"\x89HDF\r\n\x1a\n", "an HDF5 file"),
        (b"\x93NUMPY\x01\x00", "a single NumPy array"),
    ],
)
def test_what_a_file_is_instead_is_named(tmp_path, suffix, content, says):
    (tmp_path / f"a.{suffix}").write_bytes(content)
    assert f"the file is {says}" in refusal(tmp_path / f"a.{suffix}")


def test_torchscript_is_not_called_damaged(tmp_path):
    torch.jit.script(torch.nn.Linear(1, 1)).save(tmp_path / "a.pt")
    assert "are a TorchScript archive" in refusal(tmp_path / "a.pt")


def test_what_is_not_a_dict_is_refused(tmp_path):
    torch.save([torch.ones(1)], tmp_path / "a.pth")
    assert "list" in refusal(tmp_path / "a.pth")


def test_an_unknown_address_is_refused():
    with pytest.raises(InputError, match="nosuchscheme"):
        read_weights("nosuchscheme://weights.pth")


@pytest.mark.parametrize("name", ["a.pth", "a.safetensors", "a.pkl"])
@settings(max_examples=40, deadline=None)
@given(share=st.floats(0.0, 0.9), junk=st.binary(max_size=8))
def test_truncated_files_are_refused(tmp_path_factory, name, share, junk):
    path = tmp_path_factory.mktemp("cut") / name
    tensors = {"w": torch.arange(64.0)}
    if name.endswith("pth"):
        torch.save(tensors, path)
    elif name.endswith("pkl"):
        path.write_bytes(pickle.dumps({"w": tensors["w"].numpy()}))
    else:
        save_file(tensors, path)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))] + junk)
    if path.read_bytes() != content:
        refusal(path)


@pytest.mark.parametrize("name", ["a.pth", "a.safetensors", "a.pkl"])
@settings(max_examples=40, deadline=None)
@given(junk=st.binary(max_size=200))
def test_junk_is_refused(tmp_path_factory, name, junk):
    path = tmp_path_factory.mktemp("junk") / name
    path.write_bytes(junk)
    refusal(path)


@pytest.mark.parametrize("zipped", [True, False])
def test_plain_types_of_training_scripts(tmp_path, zipped):
    options = argparse.Namespace(
        lr=np.float64(0.1), seed=np.int64(3), flag=np.bool_(True), output=Path("/a/b")
    )
    content = {"model": OrderedDict(w=torch.ones(2)), "args": options, "seen": Counter([1, 1])}
    torch.save(content, tmp_path / "a.pth", _use_new_zipfile_serialization=zipped)
    got = read_weights(str(tmp_path / "a.pth"))
    assert torch.equal(got["model"]["w"], torch.ones(2))
    assert (got["args"].lr, got["args"].seed, got["args"].flag) == (0.1, 3, True)
    assert got["args"].output == PurePosixPath("/a/b")
    assert got["seen"] == {1: 2}


@pytest.mark.parametrize("foreign", [defaultdict(list), np.zeros(2), np.array(["a"], dtype=object)])
def test_other_classes_are_refused_by_name(tmp_path, foreign):
    torch.save({"x": foreign}, tmp_path / "a.pth")
    assert re.search(r"classes .*(collections\.defaultdict|numpy\.)", refusal(tmp_path / "a.pth"))


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("a.pth", ("a.pth", None)),
        ("a.pth?which=student", ("a.pth", "student")),
        ("http://x/a.pth?which=teacher", ("http://x/a.pth", "teacher")),
        ("detectron2://a.pkl?matching_heuristics=True", ("detectron2://a.pkl", None)),
        ("http://x/a.pth?token=1", ("http://x/a.pth?token=1", None)),
        ("", ("", None)),
    ],
)
def test_a_choice_at_the_end_of_a_path(path, expected):
    assert split_weights_path(path) == expected


def test_a_choice_does_not_hide_the_file(tmp_path):
    torch.save({"a": 1}, tmp_path / "a.pth")
    assert read_weights(f"{tmp_path / 'a.pth'}?which=student") == {"a": 1}


def test_the_home_folder_is_found(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    torch.save({"a": 1}, tmp_path / "a.pth")
    assert read_weights("~/a.pth") == read_weights("~/a.pth?which=student") == {"a": 1}
