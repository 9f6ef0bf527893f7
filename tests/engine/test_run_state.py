"""Folders that hold a run already, and the rows of its metrics."""

import json

import pytest
from detectron2.config import CfgNode, LazyCall
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf
from torch import nn

from flsl_d2.engine.run_folder import (
    NeutralKeys,
    ResumeOptions,
    check_and_keep_run,
    flat_config,
    trim_metrics,
)
from flsl_d2.errors import InputError


def config(**train):
    cfg = OmegaConf.create({"train": {"lr": 0.1, "betas": [0.9, 0.99], **train}})
    cfg.model = LazyCall(nn.Linear)(in_features="${train.width}", out_features=2)
    cfg.train.width = 3
    return cfg


def keep(folder, cfg, *options, **also):
    neutral = NeutralKeys((), ("train.log*",))
    check_and_keep_run(cfg, folder, "train.output_dir", ResumeOptions(*options), neutral, also)


def test_every_key_by_its_full_name():
    assert flat_config(config()) == {
        "train.lr": "0.1",
        "train.betas": "[0.9, 0.99]",
        "train.width": "3",
        "model._target_": "torch.nn.modules.linear.Linear",
        "model.in_features": "3",
        "model.out_features": "2",
    }
    assert flat_config(CfgNode({"A": {"B": (1, 2), "C": None}})) == {"A.B": "[1, 2]", "A.C": "None"}


def test_values_without_a_text_of_their_own_do_not_differ_from_process_to_process():
    first, second = ({"x": {"f": lambda: 1, "o": object()}} for _ in range(2))
    flags = {"allow_objects": True}
    assert flat_config(OmegaConf.create(first, flags=flags)) == flat_config(
        OmegaConf.create(second, flags=flags)
    )


def test_the_same_run_is_continued_and_another_is_not(tmp_path, caplog):
    keep(tmp_path, config(), images="10")
    keep(tmp_path, config(lr=0.2), images="10")  # no checkpoint: nothing to lose
    (tmp_path / "model_0000009.pth").write_bytes(b"")
    keep(tmp_path, config(lr=0.2, log_period=3), True, images="10")
    with pytest.raises(InputError, match=r"images: 10 -> 9; train\.lr: 0\.2 -> 0\.1"):
        keep(tmp_path, config(), True, images="9")
    with pytest.raises(InputError, match=r"--resume.*--overwrite"):
        keep(tmp_path, config(lr=0.2), images="10")
    # What is refused leaves no trace: the run's own settings still fit.
    keep(tmp_path, config(lr=0.2), True, images="10")
    keep(tmp_path, config(), True, True, images="10")
    assert "train.lr: 0.2 -> 0.1" in caplog.text
    keep(tmp_path, config(), True, images="10")
    keep(tmp_path, config(lr=5), False, False, True, images="10")
    assert not list(tmp_path.glob("model_*"))
    assert "lr: 5" in (tmp_path / "config.yaml").read_text()


def test_keys_of_a_newer_version_are_no_change_where_off_or_at_their_default(tmp_path):
    keep(tmp_path, config())
    (tmp_path / "model_0000009.pth").write_bytes(b"")
    before = (tmp_path / "run.json").read_text()

    def go_on(cfg):
        (tmp_path / "run.json").write_text(before)
        keep(tmp_path, cfg, True)

    for value in (0, 0.0, "", None, False, []):
        go_on(config(new=value))
    cfg = config()
    cfg.model.bias = True  # the default of torch.nn.Linear
    go_on(cfg)
    cfg.model.device = "meta"
    with pytest.raises(InputError, match=r"model\.device: absent -> meta"):
        go_on(cfg)
    with pytest.raises(InputError, match=r"train\.new: absent -> 1"):
        go_on(config(new=1))


@pytest.mark.parametrize("content", [None, "{", "[]", '{"settings": 3}'])
def test_a_lost_record_is_said(content, tmp_path, caplog):
    (tmp_path / "model_final.pth").write_bytes(b"")
    if content is not None:
        (tmp_path / "run.json").write_text(content)
    keep(tmp_path, config(), True)
    assert "run.json" in caplog.text
    assert json.loads((tmp_path / "run.json").read_text())["settings"]["train.lr"] == "0.1"


@given(
    rows=st.lists(st.integers(0, 30), unique=True).map(sorted),
    steps=st.integers(0, 40),
    cut=st.integers(0, 30),
)
def test_rows_beyond_the_checkpoint_and_half_rows_go(tmp_path_factory, rows, steps, cut):
    path = tmp_path_factory.mktemp("rows") / "metrics.json"
    text = "".join(json.dumps({"iteration": row, "loss": row / 3}) + "\n" for row in rows)
    torn = text[: len(text) - cut]
    path.write_text(torn)
    trim_metrics(path, steps)
    whole = [row for row in torn.splitlines(keepends=True) if row.endswith("\n")]
    kept = [row for row in whole if json.loads(row)["iteration"] < steps]
    assert path.read_text() == "".join(kept)


def test_no_metrics_to_trim(tmp_path):
    assert trim_metrics(tmp_path / "metrics.json", 5) == 0
