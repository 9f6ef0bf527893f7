"""Pickles are read as data: what they hold comes back, and nothing in them is imported or run."""

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
from flsl_d2.weights.pickles import read_pickle

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


def read(content: bytes):
    return read_pickle(io.BytesIO(content))[0]


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
def test_plain_values_come_back(protocol, content):
    assert same(read(pickle.dumps(content, protocol)), content)


@protocols
@settings(max_examples=25, deadline=None)
@given(array=numbers, fortran=st.booleans())
def test_arrays_come_back_as_tensors(protocol, array, fortran):
    array = np.asfortranarray(array) if fortran else array
    got = read(pickle.dumps({"a": array, "again": array, "n": array.size}, protocol))
    values = got["a"].numpy()
    np.testing.assert_array_equal(values, array)
    assert (values.dtype, values.shape) == (array.dtype.newbyteorder("="), array.shape)
    assert got["a"] is got["again"]
    assert got["n"] == array.size


@protocols
def test_numpy_scalars_and_shared_containers(protocol):
    shared = [1, 2]
    content = {"x": np.float32(1.5), "y": np.int64(7), "a": shared, "b": (shared, shared)}
    got = read(pickle.dumps(content, protocol))
    assert got == {"x": 1.5, "y": 7, "a": [1, 2], "b": ([1, 2], [1, 2])}


def test_containers_that_hold_themselves_or_grow_without_end():
    cycle: list = []
    cycle.append(cycle)
    assert read(pickle.dumps({"a": cycle}))["a"][0][0]
    wide: tuple = (1,)
    for _ in range(60):  # 2 ** 60 leaves
        wide = (wide, wide)
    assert read(pickle.dumps({"a": wide}))


def test_what_python_2_wrote():
    """Strings as bytes of no encoding, arrays with their data in such a string."""
    data = b"\x00\x00\x80?\x00\x00\x00\xc0"  # 1, -2
    program = (
        b"\x80\x02}U\x01acnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b"
        b"\x87R(K\x01K\x02\x85cnumpy\ndtype\nU\x02f4K\x00K\x01\x87R(K\x03U\x01<NNNJ\xff\xff\xff"
        b"\xffJ\xff\xff\xff\xffK\x00tb\x89U\x08" + data + b"tbs."
    )
    np.testing.assert_array_equal(read(program)["a"], np.array([1, -2], "f4"))


class Runs:
    def __reduce__(self):
        return (os.system, ("touch ran",))


class Plain:
    """An own class with attributes."""

    def __init__(self) -> None:
        self.values = {"w": torch.ones(2)}


@protocols
@pytest.mark.parametrize(
    ("content", "name"),
    [
        ({"a": Runs()}, "posix.system"),
        ({"model": {"w": np.ones(2)}, "x": [Runs()]}, "posix.system"),
        ({"a": eval}, "eval"),
        ({"a": os.system}, "posix.system"),
    ],
)
def test_commands_are_refused_by_name_and_do_not_run(
    tmp_path, monkeypatch, protocol, content, name
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(content, protocol))
    torch.save(content, tmp_path / "a.pth", pickle_protocol=max(protocol, 2))
    for file in ("a.pkl", "a.pth"):
        with pytest.raises(InputError, match=name) as error:
            read_weights(str(tmp_path / file))
        assert "\n" not in str(error.value)
    assert not Path("ran").exists()


@protocols
@pytest.mark.parametrize(
    "foreign",
    [
        defaultdict(list, a=[1]),
        np.array([Plain()], dtype=object),
        np.array(["text"]),
        np.zeros(2, dtype=[("a", "f4")]),
        {1, 2},
        Path("/a"),
        torch.torch_version.TorchVersion("2.1"),
        np.random.RandomState(0).get_state(),
        np.random.default_rng(0),
    ],
    ids=lambda value: type(value).__name__,
)
def test_objects_of_other_classes_do_not_keep_tensors_from_being_read(tmp_path, protocol, foreign):
    content = {"model": {"w": np.arange(2.0)}, "beside": foreign}
    assert read(pickle.dumps(content, protocol))["model"]["w"].tolist() == [0, 1]
    content = {"model": {"w": torch.arange(2.0)}, "beside": foreign}
    for zipped in (True, False):
        torch.save(
            content,
            tmp_path / "a",
            pickle_protocol=max(protocol, 2),
            _use_new_zipfile_serialization=zipped,
        )
        assert read_weights(str(tmp_path / "a"))["model"]["w"].tolist() == [0, 1]


def test_an_object_becomes_its_attributes():
    assert read(pickle.dumps({"a": Plain()}))["a"]["values"]["w"].tolist() == [1, 1]


@pytest.mark.parametrize(
    "program",
    [
        b"cos\nsystem\n(S'touch ran'\ntR.",
        b"(S'touch ran'\nios\nsystem\n.",
        b"(cos\nsystem\nS'touch ran'\no.",
        b"cbuiltins\nbytes\n(S'x'\nt\x81.",
        b"cbuiltins\nbytearray\n(I1000000000000\ntR.",
        b"c_codecs\nencode\n(Vx\nVzip\ntR.",
        b"ccollections\nOrderedDict\n.",
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
        b".",
    ],
)
def test_hostile_programs(tmp_path, monkeypatch, program):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.pkl").write_bytes(program)
    with pytest.raises(InputError):
        read_weights(str(tmp_path / "a.pkl"))
    assert not Path("ran").exists()


def test_a_pickle_cannot_change_the_functions_that_it_may_call():
    before = dict(read_pickle.__globals__["_KNOWN"])
    program = (
        b"ctorch._utils\n_rebuild_parameter\n(N}S'__defaults__'\n(I1\ntsIb}S'a'\nI1\ns.",
        b"ccollections\nOrderedDict\n}S'x'\nI1\nsb}S'a'\nI1\ns.",
    )
    for each in program:
        try:
            read(each)
        except Exception:
            continue
    assert read_pickle.__globals__["_KNOWN"] == before
    assert read_pickle.__globals__["_first"].__defaults__ is None


def test_an_array_larger_than_its_data_is_refused(tmp_path):
    good = pickle.dumps({"a": np.zeros(3, "f4")}, 2)
    (tmp_path / "a.pkl").write_bytes(good.replace(b"K\x03\x85", b"K\x7f\x85", 1))
    with pytest.raises(InputError):
        read_weights(str(tmp_path / "a.pkl"))


@pytest.mark.parametrize("zipped", [True, False])
def test_every_kind_of_tensor_comes_back(tmp_path, zipped):
    base = torch.arange(24.0).reshape(4, 6)
    content = {
        **{str(d): base.to(d) for d in (torch.float64, torch.float16, torch.bfloat16)},
        **{str(d): base.to(d) for d in (torch.int64, torch.uint8, torch.bool, torch.complex64)},
        **{"f8": base.to(torch.float8_e4m3fn), "part": base[1:, ::2], "again": base},
        **{"parameter": torch.nn.Parameter(base), "scalar": torch.tensor(3.0)},
        **{"empty": torch.empty(0, 3), "turned": base.T},
    }
    torch.save(content, tmp_path / "a", _use_new_zipfile_serialization=zipped)
    got = read_weights(str(tmp_path / "a"))
    assert list(got) == list(content)
    for name, tensor in content.items():
        assert torch.equal(got[name].float(), tensor.detach().float()), name
        assert (got[name].dtype, got[name].shape) == (tensor.dtype, tensor.shape)
    assert got["again"].data_ptr() == got["turned"].data_ptr()  # they share their memory


def test_a_plain_pickle_of_tensors(tmp_path):
    (tmp_path / "a.pkl").write_bytes(pickle.dumps({"w": torch.arange(3.0)}))
    assert torch.equal(read_weights(str(tmp_path / "a.pkl"))["w"], torch.arange(3.0))
