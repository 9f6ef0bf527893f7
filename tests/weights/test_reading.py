"""Reading weight files: what is data loads, what is not is refused in one sentence."""

import argparse
import io
import json
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer

from flsl_d2.errors import InputError
from flsl_d2.weights import build_encoder, read_weights
from flsl_d2.weights.reading import split_weights_path


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
    assert (got["args"], got["epoch"]) == ({"lr": 0.1}, 3)


def test_reads_safetensors(tmp_path):
    path = tmp_path / "a.safetensors"
    save_file({"w": torch.arange(3.0)}, path)
    assert torch.equal(read_weights(str(path))["w"], torch.arange(3.0))


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


FORMATS = {
    "torch": lambda tensors, path: torch.save(tensors, path),
    "old torch": lambda tensors, path: torch.save(
        tensors, path, _use_new_zipfile_serialization=False
    ),
    "safetensors": lambda tensors, path: save_file(tensors, path),
    "pickle": lambda tensors, path: path.write_bytes(
        pickle.dumps({name: tensor.numpy() for name, tensor in tensors.items()})
    ),
    "numpy": lambda tensors, path: path.write_bytes(_archive(tensors)),
}


def _archive(tensors) -> bytes:
    stream = io.BytesIO()
    np.savez(stream, **{name: tensor.numpy() for name, tensor in tensors.items()})
    return stream.getvalue()


@pytest.mark.parametrize("name", ["a.pth", "a.safetensors", "a.pkl", "a.npz", "8c3f0e", "a.ckpt"])
@pytest.mark.parametrize("kind", FORMATS)
def test_the_content_decides_on_the_format(tmp_path, name, kind):
    tensors = {"w": torch.arange(3.0), "b": torch.ones(2, 2)}
    FORMATS[kind](tensors, tmp_path / name)
    got = read_weights(str(tmp_path / name))
    assert got.keys() == tensors.keys()
    assert all(torch.equal(got[name], tensor) for name, tensor in tensors.items())


def sharded(folder, kind: str) -> dict:
    """Write the four tensors of a model into two shards with an index."""
    tensors = {f"w{i}": torch.full((2,), float(i)) for i in range(4)}
    ending, stem = ("safetensors", "model") if kind == "safetensors" else ("bin", "pytorch_model")
    places = {}
    for number, names in enumerate((["w0", "w1"], ["w2", "w3"]), 1):
        name = f"{stem}-{number:05d}-of-00002.{ending}"
        FORMATS[kind]({n: tensors[n] for n in names}, folder / name)
        places |= dict.fromkeys(names, name)
    index = {"metadata": {"total_size": 1}, "weight_map": places}
    (folder / f"{stem}.{ending}.index.json").write_text(json.dumps(index))
    return tensors


@pytest.mark.parametrize("kind", ["safetensors", "torch"])
def test_an_index_gives_the_whole_and_a_shard_is_refused(tmp_path, monkeypatch, kind):
    tensors = sharded(tmp_path, kind)
    (index,) = tmp_path.glob("*.index.json")
    monkeypatch.chdir(tmp_path)
    for path in (index, tmp_path, index.name):
        got = read_weights(str(path))
        assert all(torch.equal(got[name], tensor) for name, tensor in tensors.items())
    first, second = sorted(p for p in tmp_path.iterdir() if "-of-" in p.name)
    assert f"part 1 of 2 of a model; give {index.name}" in refusal(first)
    for unnumbered in (second.rename(tmp_path / "second"),):
        index.write_text(index.read_text().replace(second.name, "second"))
        assert "one of several shards" in refusal(unnumbered)
    (tmp_path / "second").unlink()
    with pytest.raises(InputError, match="second' do not exist"):
        read_weights(str(index))
    index.unlink()
    assert "part 1 of 2" in refusal(first)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ('{"weight_map": {"w": "../a.pth"}}', "not beside it"),
        ('{"hidden_size": 192}', "without weight_map"),
        ('{"weight_map": ', "cannot be read"),
    ],
)
def test_an_index_that_cannot_be_used(tmp_path, content, says):
    (tmp_path / "model.safetensors.index.json").write_text(content)
    assert says in refusal(tmp_path / "model.safetensors.index.json")


def test_a_whole_module_is_read_as_its_state_dict(tmp_path):
    model = VisionTransformer(32, 16, embed_dim=192, depth=1, num_heads=3, num_classes=0)
    torch.save(model, tmp_path / "a.pth")
    encoder = build_encoder(str(tmp_path / "a.pth"))
    assert torch.equal(encoder.blocks[0].attn.qkv.weight, model.blocks[0].attn.qkv.weight)


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
