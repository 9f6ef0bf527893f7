"""Pickles of weights are read, anything else in a pickle is refused by name and never run."""

from __future__ import annotations

import io
import os
import pickle
from collections import OrderedDict, defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from flsl_d2.errors import InputError
from flsl_d2.weights import read_weights
from flsl_d2.weights.plain_pickle import ForeignObjectError, read_plain_pickle

protocols = pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))

plain = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text()
    | st.binary()
    | st.binary().map(bytearray),
    lambda inner: (
        st.lists(inner)
        | st.lists(inner).map(tuple)
        | st.dictionaries(st.text() | st.integers(), inner)
        | st.dictionaries(st.text(), inner).map(OrderedDict)
    ),
    max_leaves=20,
)
numbers = arrays.arrays(
    st.sampled_from(["f2", "<f4", ">f4", "f8", "i1", "<i8", ">i4", "u1", "?", "c8"]),
    arrays.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4),
    elements={"allow_nan": False},
)


def read(content: bytes, folder: Path):
    (folder / "a.pkl").write_bytes(content)
    return read_plain_pickle(str(folder / "a.pkl"))


def same(ours, theirs) -> bool:
    if isinstance(theirs, (bytes, bytearray)):  # a bytearray may come back as bytes
        return bytes(ours) == bytes(theirs)
    if isinstance(theirs, dict) != isinstance(ours, dict):
        return False
    if not isinstance(theirs, dict) and type(ours) is not type(theirs):
        return False
    if isinstance(theirs, dict):
        return list(ours) == list(theirs) and all(same(ours[k], theirs[k]) for k in theirs)
    if isinstance(theirs, (list, tuple)):
        return len(ours) == len(theirs) and all(map(same, ours, theirs))
    return ours == theirs


@protocols
@settings(max_examples=25, deadline=None)
@given(content=plain)
def test_plain_values_come_back(tmp_path_factory, protocol, content):
    folder = tmp_path_factory.mktemp("plain")
    assert same(read(pickle.dumps(content, protocol), folder), content)


@protocols
@settings(max_examples=25, deadline=None)
@given(array=numbers, fortran=st.booleans())
def test_arrays_come_back(tmp_path_factory, protocol, array, fortran):
    array = np.asfortranarray(array) if fortran else array
    folder = tmp_path_factory.mktemp("array")
    got = read(pickle.dumps({"a": array, "again": array, "n": array.size}, protocol), folder)
    values = got["a"].numpy()
    np.testing.assert_array_equal(values, array)
    assert (values.dtype, values.shape) == (array.dtype.newbyteorder("="), array.shape)
    assert got["a"] is got["again"]
    assert got["n"] == array.size


@protocols
def test_numpy_scalars_and_shared_containers(tmp_path, protocol):
    shared = [1, 2]
    content = {"x": np.float32(1.5), "y": np.int64(7), "a": shared, "b": (shared, shared)}
    got = read(pickle.dumps(content, protocol), tmp_path)
    assert got == {"x": 1.5, "y": 7, "a": [1, 2], "b": ([1, 2], [1, 2])}


def test_what_python_2_wrote(tmp_path):
    """Strings as bytes of no encoding, arrays with their data in such a string."""
    data = b"\x00\x00\x80?\x00\x00\x00\xc0"  # 1, -2
    program = (
        b"\x80\x02}U\x01acnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b"
        b"\x87R(K\x01K\x02\x85cnumpy\ndtype\nU\x02f4K\x00K\x01\x87R(K\x03U\x01<NNNJ\xff\xff\xff"
        b"\xffJ\xff\xff\xff\xffK\x00tb\x89U\x08" + data + b"tbs."
    )
    np.testing.assert_array_equal(read(program, tmp_path)["a"], np.array([1, -2], "f4"))


class Runs:
    def __reduce__(self):
        return (os.system, ("touch ran",))


class Plain:
    """An own class without any code in its pickle."""


@protocols
@pytest.mark.parametrize(
    ("content", "name"),
    [
        (Runs(), "posix.system"),
        ({"model": {"w": np.ones(2)}, "x": [Runs()]}, "posix.system"),
        (Plain(), "copyreg|copy_reg|Plain"),
        (defaultdict(list), "collections.defaultdict"),
        (np.array([Plain()], dtype=object), "numpy.dtype"),
        (np.array(["text"]), "numpy.dtype"),
        (np.zeros(2, dtype=[("a", "f4")]), "numpy.dtype"),
        (torch.ones(2), "torch"),
        (eval, "eval"),
        (os.system, "posix.system"),
    ],
)
def test_everything_else_is_refused_by_name_and_does_not_run(
    tmp_path, monkeypatch, protocol, content, name
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ForeignObjectError, match=name):
        read(pickle.dumps(content, protocol), tmp_path)
    with pytest.raises(InputError, match=name) as error:
        read_weights(str(tmp_path / "a.pkl"))
    assert "\n" not in str(error.value)
    assert not Path("ran").exists()


@pytest.mark.parametrize(
    "program",
    [
        b"cos\nsystem\n(S'touch ran'\ntR.",
        b"(S'touch ran'\nios\nsystem\n.",
        b"(cos\nsystem\nS'touch ran'\no.",
        b"cbuiltins\nbytes\n(S'x'\nt\x81.",
        b"cbuiltins\nbytearray\n(I1000000000000\ntR.",
        b"cnumpy\nndarray\n(I1000000000000\ntR.",
        b"cnumpy\ndtype\n(S'O'\nI0\nI1\ntR.",
        b"c_codecs\nencode\n(Vx\nVzip\ntR.",
        b"ccollections\nOrderedDict\n.",
        b"ccollections\nOrderedDict\n)R}S'a'\nI1\nsb.",
        b"}S'a'\nI1\nsP1\n.",
        b"\x80\x02\x82\x01.",
        b"(.",
        b"}a.",
        b"}(I1\nu.",
        b"]I1\nI2\ns.",
        b"g5\n.",
        b"\x8d\x00\x00\x00\x00\x00\x00\x00\x01",  # a string of 72 PB
        b"\x8b\xff\xff\xff\x7f\x01.",  # an integer of 2 GB
        b"Nr\xff\xff\xff\x7f.",  # a memo of 2 billion places
        b"ccollections\nOrderedDict\n(}S'call'\nNstb.",
        b"cnumpy\nndarray\n)R}S'values'\nI1\nsb.",
        b".",
        b"cnumpy.core.multiarray\n_reconstruct\n(t(tR.",
    ],
)
def test_hostile_programs(tmp_path, monkeypatch, program):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.pkl").write_bytes(program)
    with pytest.raises(InputError):
        read_weights(str(tmp_path / "a.pkl"))
    assert not Path("ran").exists()


def test_an_array_larger_than_its_data_is_refused(tmp_path):
    good = pickle.dumps({"a": np.zeros(3, "f4")}, 2)
    (tmp_path / "a.pkl").write_bytes(good.replace(b"K\x03\x85", b"K\x7f\x85", 1))
    with pytest.raises(InputError):
        read_weights(str(tmp_path / "a.pkl"))


def test_arrays_become_tensors(tmp_path):
    stream = io.BytesIO()
    content = {"model": {"w": np.arange(3, dtype=">f4")}, "__author__": "A", "n": [1]}
    pickle.dump(content, stream)
    (tmp_path / "a.pkl").write_bytes(stream.getvalue())
    got = read_weights(str(tmp_path / "a.pkl"))
    assert torch.equal(got["model"]["w"], torch.arange(3.0))
    assert (got["__author__"], got["n"]) == ("A", [1])
