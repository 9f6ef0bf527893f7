"""Config files of both kinds: found, checked, and refused in one sentence."""

import builtins

import pytest

from flsl_d2.engine.config_files import (
    load_config,
    load_lazy_config,
    load_yaml_config,
    resolve_config_path,
)
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
    assert load_config(child, ["train.seed=4"]).train == {"max_iter": 2, "seed": 4}


def test_missing_empty_and_foreign_files(write, tmp_path):
    assert "does not exist" in refusal(load_config, str(tmp_path / "no.py"))
    assert "does not exist" in refusal(load_yaml_config, str(tmp_path / "no.yaml"))
    assert "--config-file" in refusal(resolve_config_path, "")
    assert ".json" in refusal(load_config, write("a.json", "{}"))
    assert "is YAML" in refusal(load_lazy_config, write("a.yaml", "SEED: 1"))
    folder = tmp_path / "folder.py"
    folder.mkdir()
    assert "does not exist" in refusal(load_config, str(folder))


def test_a_syntax_error_names_file_and_line(write):
    base = write("base.py", "train = dict(\nmax_iter==)")
    child = write("child.py", "from .base import train")
    for path in (base, child):
        text = refusal(load_lazy_config, path)
        assert "line 2" in text
        assert "base.py" in text


def test_an_input_error_inside_a_config_is_kept_and_imports_still_work(write):
    original = builtins.__import__
    path = write(
        "a.py", "from flsl_d2.errors import InputError\nraise InputError('patch 7 is odd.')"
    )
    assert refusal(load_lazy_config, path) == "patch 7 is odd."
    assert builtins.__import__ is original


def test_yaml_config_has_this_projects_nodes(write):
    path = write(
        "a.yaml",
        "MODEL:\n  BACKBONE:\n    NAME: build_flsl_vit_sfp_backbone\n  FLSL_VIT:\n    DEPTH: 4\n"
        "SOLVER:\n  OPTIMIZER: ADAMW\n",
    )
    cfg = load_yaml_config(path, ["SOLVER.LAYER_DECAY", "0.7", "MODEL.DEVICE", "cpu"])
    assert (cfg.MODEL.FLSL_VIT.DEPTH, cfg.SOLVER.OPTIMIZER) == (4, "ADAMW")
    assert (cfg.SOLVER.LAYER_DECAY, cfg.MODEL.DEVICE) == (0.7, "cpu")


def test_yaml_names_all_unknown_keys_of_file_and_overrides(write):
    path = write("a.yaml", "MODEL:\n  DEVISE: cpu\nSOLVERS:\n  BASE_LR: 1.0\n")
    text = refusal(load_yaml_config, path, ["SOLVER.BASE_RL", "1", "SEED", "1"])
    assert "MODEL.DEVISE (did you mean MODEL.DEVICE" in text
    assert "SOLVERS" in text
    assert "SOLVER.BASE_RL (did you mean SOLVER.BASE_LR" in text


@pytest.mark.parametrize(
    ("text", "overrides"),
    [
        ("MODEL: [1", []),
        ("", []),
        ("- 1\n- 2", []),
        ("_BASE_: none.yaml", []),
        ("SEED: !!python/object/apply:os.getpid []", []),
        ("SEED: many", []),
        ("SOLVER:\n  BASE_LR: [1]", []),
        ("SEED: 1", ["SEED"]),
        ("SEED: 1", ["SEED=2", "X"]),
        ("SEED: 1", ["SOLVER.MAX_ITER", "many"]),
    ],
)
def test_broken_yaml_is_refused(write, text, overrides):
    refusal(load_yaml_config, write("a.yaml", text), overrides)
