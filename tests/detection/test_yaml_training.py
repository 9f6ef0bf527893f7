"""YAML configs: this project's nodes, unknown keys and broken files."""

from __future__ import annotations

import pytest

from flsl_d2.detection.yaml_training import load_yaml_config
from flsl_d2.errors import InputError


@pytest.fixture
def write(tmp_path):
    def _write(name: str, text: str) -> str:
        (tmp_path / name).write_text(text)
        return str(tmp_path / name)

    return _write


def refusal(path: str, overrides: list[str]) -> str:
    with pytest.raises(InputError) as error:
        load_yaml_config(path, overrides)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_yaml_config_has_this_projects_nodes(write):
    path = write(
        "a.yaml",
        "MODEL:\n  BACKBONE:\n    NAME: build_flsl_vit_sfp_backbone\n  FLSL_VIT:\n    DEPTH: 4\n"
        "SOLVER:\n  OPTIMIZER: ADAMW\n",
    )
    cfg = load_yaml_config(path, ["SOLVER.LAYER_DECAY", "0.7", "MODEL.DEVICE", "cpu"])
    assert (cfg.MODEL.FLSL_VIT.DEPTH, cfg.SOLVER.OPTIMIZER) == (4, "ADAMW")
    assert (cfg.SOLVER.LAYER_DECAY, cfg.MODEL.DEVICE) == (0.7, "cpu")


def test_an_unknown_key_is_named_with_the_closest_ones(write):
    path = write("a.yaml", "MODEL:\n  DEVISE: cpu\n")
    assert "MODEL.DEVISE (did you mean MODEL.DEVICE" in refusal(path, [])
    path = write("b.yaml", "SEED: 1")
    assert "SOLVER.BASE_RL (did you mean SOLVER.BASE_LR" in refusal(path, ["SOLVER.BASE_RL", "1"])


def test_home_folder(write, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    path = write("a.yaml", "OUTPUT_DIR: ~/out")
    cfg = load_yaml_config(path, ["MODEL.WEIGHTS", "~/a.pth"])
    assert (cfg.OUTPUT_DIR, cfg.MODEL.WEIGHTS) == ("/home/me/out", "/home/me/a.pth")


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
    refusal(write("a.yaml", text), overrides)
