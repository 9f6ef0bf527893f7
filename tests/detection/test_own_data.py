"""Files named on the command line take the place of a recipe's data set."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from detectron2.config import instantiate
from detectron2.data import DatasetCatalog, MetadataCatalog

from flsl_d2.detection.checks import use_own_data
from flsl_d2.engine.config_files import load_lazy_config
from flsl_d2.errors import InputError

RECIPE = "coco/mask_rcnn_flsl_vit_s16_1x.py"


def write(path: Path, categories: dict[int, str], images: int = 2) -> str:
    content = {
        "images": [
            {"id": i, "file_name": f"{i}.jpg", "width": 9, "height": 9} for i in range(images)
        ],
        "categories": [{"id": i, "name": name} for i, name in categories.items()],
        "annotations": [
            {"id": 1, "image_id": 0, "bbox": [1, 1, 4, 4], "area": 16, "iscrowd": 0}
            | {"category_id": min(categories)}
        ],
    }
    path.write_text(json.dumps(content))
    for image in content["images"]:
        (path.parent / image["file_name"]).touch()
    return str(path)


@pytest.fixture
def files(tmp_path):
    train = write(tmp_path / "train.json", {3: "nut", 1: "bolt"})
    test = write(tmp_path / "test.json", {1: "bolt", 3: "nut"})
    yield train, test, str(tmp_path)
    for name in [name for name in DatasetCatalog if name.startswith(("train.json@", "test.json@"))]:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


def lazy(split: str, file: str, root: str) -> list[str]:
    node = f"dataloader.{split}.dataset"
    return [f"{node}.json_file={file}", f"{node}.image_root={root}"]


def test_two_overrides_and_nothing_else(files, caplog):
    train, _, root = files
    cfg = load_lazy_config(RECIPE, lazy("train", train, root))
    use_own_data(cfg, eval_only=False)
    assert cfg.model.roi_heads.num_classes == 2
    assert "evaluator" not in cfg.dataloader
    assert "without evaluation" in caplog.text
    records = instantiate(cfg.dataloader.train.dataset)
    assert [r["file_name"] for r in records] == [f"{root}/0.jpg"]  # the other one is empty
    name = cfg.dataloader.train.dataset.names
    assert MetadataCatalog.get(name).json_file == train
    assert MetadataCatalog.get(name).thing_classes == ["bolt", "nut"]
    model = instantiate(cfg.model)
    assert model.roi_heads.box_predictor.cls_score.out_features == 3


def test_training_and_evaluation(files, caplog):
    train, test, root = files
    overrides = lazy("train", train, root) + lazy("test", test, root)
    for recipe, key in (
        (RECIPE, "roi_heads.num_classes"),
        ("coco/retinanet_flsl_vit_s16_1x.py", "num_classes"),
        ("coco/cascade_mask_rcnn_flsl_vit_b16_1x.py", "roi_heads.num_classes"),
    ):
        cfg = load_lazy_config(recipe, overrides)
        with caplog.at_level("INFO"):
            use_own_data(cfg, eval_only=False)
        assert f"model.{key} is set to 2" in caplog.text
        *parents, last = key.split(".")
        node = cfg.model[parents[0]] if parents else cfg.model
        assert node[last] == 2
        assert cfg.dataloader.evaluator.dataset_name == cfg.dataloader.test.dataset.names
        assert len(instantiate(cfg.dataloader.test.dataset)) == 2


def test_recipes_without_own_files_stay_as_they_are():
    cfg, untouched = load_lazy_config(RECIPE), load_lazy_config(RECIPE)
    use_own_data(cfg, eval_only=False)
    assert cfg == untouched


def test_what_cannot_be_used_is_said(files, tmp_path):
    train, _, root = files
    nothing = tmp_path / "nothing.json"
    nothing.write_text('{"images": []}')
    for overrides, eval_only, message in (
        ([f"dataloader.train.dataset.json_file={train}"], False, "image_root is empty"),
        ([f"dataloader.test.dataset.image_root={root}"], False, "json_file is empty"),
        (lazy("train", f"{root}/none.json", root), False, "does not exist"),
        (lazy("train", str(nothing), root), False, "lacks the list categories"),
        (lazy("train", train, root), True, "--eval-only"),
        (lazy("train", f"[{train},{train}]", root), False, "takes one path"),
        (lazy("train", train, root) + lazy("test", train, "elsewhere"), False, "two folders"),
    ):
        with pytest.raises(InputError, match=message):
            use_own_data(load_lazy_config(RECIPE, overrides), eval_only)
