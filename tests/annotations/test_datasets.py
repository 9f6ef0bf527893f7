"""Names in Detectron2's catalog."""

from __future__ import annotations

import subprocess
import sys
import uuid
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, DatasetMapper, MetadataCatalog

from flsl_d2.annotations import register_builtin, register_coco_format, register_scenes
from flsl_d2.errors import InputError
from flsl_d2.scenes import CLASS_NAMES, make_scenes


@pytest.fixture
def name():
    name = f"test_{uuid.uuid4().hex}"
    yield name
    for each in [n for n in DatasetCatalog.list() if n.startswith(name)]:
        DatasetCatalog.remove(each)
        MetadataCatalog.remove(each)


def test_known_names_are_registered_when_they_are_used() -> None:
    # In a process of its own: other tests of this one use the names.
    done = subprocess.run([sys.executable, "-c", _IMPORT], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


_IMPORT = """
import flsl_d2, flsl_d2.annotations, flsl_d2.detection.train
from detectron2.data import DatasetCatalog
known = ["pennfudan_val", "uavdt_test", "objects365_train", "imagenet_boxes_val"]
assert not {*known} & {*DatasetCatalog}, list(DatasetCatalog)
DatasetCatalog.register("objects365_train", list)  # a host project's own
from flsl_d2.annotations.datasets import check_registered_name, use_own_loader
for name in known:
    check_registered_name(name)
    assert name in DatasetCatalog
assert DatasetCatalog["objects365_train"] is list
"""


def test_builtin_leaves_a_users_own_name_alone(tmp_path: Path) -> None:
    register_builtin()
    kept = DatasetCatalog["pennfudan_train"], MetadataCatalog["pennfudan_train"]
    DatasetCatalog.remove("pennfudan_train")
    try:
        DatasetCatalog.register("pennfudan_train", lambda: [{"own": True}])
        register_builtin(tmp_path)
        assert DatasetCatalog.get("pennfudan_train") == [{"own": True}]
    finally:
        DatasetCatalog["pennfudan_train"], MetadataCatalog["pennfudan_train"] = kept


def test_registering_twice(name: str) -> None:
    register_coco_format(name, "a.json", Path("images"))
    loader = DatasetCatalog[name]
    register_coco_format(name, Path("a.json"), "images")
    assert DatasetCatalog[name] is loader
    with pytest.raises(InputError, match=r"already registered with a\.json"):
        register_coco_format(name, "b.json", "images")
    register_coco_format(name, "b.json", "images", replace=True)
    assert MetadataCatalog.get(name).json_file == "b.json"


def test_a_loader_of_ones_own_is_not_overwritten(name: str) -> None:
    DatasetCatalog.register(name, list)
    with pytest.raises(InputError, match="a loader of its own"):
        register_coco_format(name, "b.json", "images")
    assert DatasetCatalog.get(name) == []


def test_stale_metadata_does_not_stand_in_the_way(name: str) -> None:
    register_coco_format(name, "a.json", "images")
    DatasetCatalog.remove(name)
    register_coco_format(name, "b.json", "images")
    assert MetadataCatalog.get(name).json_file == "b.json"


def test_scenes_go_through_detectron2s_own_mapper(name: str, tmp_path: Path) -> None:
    make_scenes(tmp_path / "other", num_train=1, num_val=1, image_size=(64, 64))
    register_scenes(tmp_path / "other", name)
    make_scenes(tmp_path / "s", num_train=5, num_val=2, image_size=(128, 96))
    register_scenes(tmp_path / "s", name)
    records = DatasetCatalog.get(f"{name}_train")
    assert len(records) == 5
    assert MetadataCatalog.get(f"{name}_train").thing_classes == list(CLASS_NAMES)
    cfg = get_cfg()
    cfg.MODEL.MASK_ON = True
    cfg.INPUT.MASK_FORMAT = "bitmask"
    mapper = DatasetMapper(cfg, is_train=True)
    for record in records:
        mapped = mapper(record)
        instances = mapped["instances"]
        assert len(instances) == len(record["annotations"])
        assert mapped["image"].dtype == torch.uint8
        assert instances.gt_masks.tensor.sum((1, 2)).min() > 0
        assert instances.gt_classes.max() < len(CLASS_NAMES)


@pytest.mark.parametrize(("each", "images"), [("pennfudan_train", 120), ("pennfudan_val", 50)])
def test_penn_fudan_loads(each: str, images: int, datasets_root: Path) -> None:
    if not (datasets_root / "pennfudan").is_dir():
        pytest.skip(f"no pennfudan in {datasets_root}")
    register_builtin()
    records = DatasetCatalog.get(each)
    assert len(records) == images
    assert MetadataCatalog.get(each).thing_classes == ["person"]
    boxes = np.array([a["bbox"] for r in records for a in r["annotations"]])
    assert (boxes[:, 2:] > 0).all()
