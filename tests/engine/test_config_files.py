"""Config files: found, checked, and refused in one sentence."""

import builtins

import pytest

from flsl_d2.engine.config_files import load_lazy_config, resolve_config_path
from flsl_d2.errors import InputError


@pytest.fixture
def write(tmp_path):
    def _write(name: str, text: str) -> str:
        (tmp_path / name).write_text(text)
        return str(tmp_path / name)

    return _write


def refusal(function, *args) -> str:
    with pytest.raises(InputError) as error:
        function(*args)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_lazy_config_with_a_relative_import(write):
    write("base.py", "train = dict(max_iter=1, seed=-1)")
    child = write("child.py", "from .base import train\ntrain.max_iter = 2")
    assert load_lazy_config(child, ["train.seed=4"]).train == {"max_iter": 2, "seed": 4}


def test_missing_empty_and_foreign_files(write, tmp_path):
    assert "does not exist" in refusal(load_lazy_config, str(tmp_path / "no.py"))
    assert "--config-file" in refusal(resolve_config_path, "")
    assert ".json" in refusal(load_lazy_config, write("a.json", "{}"))
    assert "is YAML" in refusal(load_lazy_config, write("a.yaml", "SEED: 1"))
    folder = tmp_path / "folder.py"
    folder.mkdir()
    assert "does not exist" in refusal(load_lazy_config, str(folder))


def test_a_syntax_error_names_file_and_line(write):
    base = write("base.py", "train = dict(\nmax_iter==)")
    child = write("child.py", "from .base import train")
    for path in (base, child):
        text = refusal(load_lazy_config, path)
        assert "line 2" in text
        assert "base.py" in text


def test_an_input_error_inside_a_config_is_kept_and_imports_still_work(write):
    original = builtins.__import__
    text = "from flsl_d2.errors import InputError\nraise InputError('patch 7 is odd.')"
    path = write("a.py", text)
    assert refusal(load_lazy_config, path) == "patch 7 is odd."
    assert builtins.__import__ is original


def test_home_folder_in_every_text_of_a_config(write, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    path = write(
        "a.py",
        "train = dict(weights='~/a.pth', same='${train.weights}', deep=[dict(x='~')], no='a~b')",
    )
    cfg = load_lazy_config(path, ["train.no=~/b", "+train.many=[~/c,d]"])
    assert cfg.train.weights == cfg.train.same == "/home/me/a.pth"
    assert cfg.train.deep[0].x == "/home/me"
    assert (cfg.train.no, cfg.train.many) == ("/home/me/b", ["/home/me/c", "d"])
    assert load_lazy_config(path).train.no == "a~b"
