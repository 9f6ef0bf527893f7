"""Recipes by name, from a checkout and from an installed wheel."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from flsl_d2 import model_zoo
from flsl_d2.errors import InputError

ROOT = Path(__file__).resolve().parents[2]


def test_both_kinds_by_name():
    lazy = model_zoo.get_config("coco/mask_rcnn_flsl_vit_s16_1x.py")
    assert lazy.model.backbone.net.embed_dim == 384
    cfg = model_zoo.get_config("coco/mask_rcnn_flsl_vit_s16_1x.yaml")
    assert cfg.MODEL.BACKBONE.NAME == "build_flsl_vit_sfp_backbone"


def test_unknown_name_gives_the_closest():
    with pytest.raises(InputError, match=r"mask_rcnn_flsl_vit_s16_1x\.py"):
        model_zoo.get_config("coco/mask_rcnn_flsl_vit_s16_2x.py")


def test_from_a_wheel(tmp_path):
    """Built as pip would build it, unpacked elsewhere, with the checkout out of reach."""
    subprocess.run(
        [sys.executable, "setup.py", "-q", "build", "--build-base", str(tmp_path / "build")],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    library = tmp_path / "build" / "lib"
    code = """
import flsl_d2, flsl_d2.model_zoo as zoo
for path in sorted(zoo.configs_folder().rglob("*.*")):
    name = path.relative_to(zoo.configs_folder())
    # Those of pre-training need the checkout.
    if not {"common", "pretrain", "demo", "__pycache__"} & set(name.parts):
        cfg = zoo.get_config(str(name))
        print(name, "ROI_HEADS" in cfg.MODEL if name.suffix == ".yaml" else cfg.train.max_iter > 0)
print(flsl_d2.__file__)
"""
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(library)},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert str(library) in result.stdout
    shipped = {line.split()[0] for line in result.stdout.splitlines() if line.endswith(" True")}
    folder = ROOT / "configs"
    ours = {
        str(path.relative_to(folder))
        for path in folder.rglob("*.*")
        if path.suffix in (".py", ".yaml")
        and not {"common", "pretrain", "demo"} & set(path.relative_to(folder).parts)
    }
    assert shipped == ours
    assert {"lvis", "objects365", "uavdt", "ade20k", "coco"} == {Path(n).parts[0] for n in shipped}
