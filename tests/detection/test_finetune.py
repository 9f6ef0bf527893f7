"""From annotations to a detector with one command, on drawn scenes and in this process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.config import instantiate
from omegaconf import OmegaConf
from PIL import Image

from flsl_d2 import Predictor
from flsl_d2.annotations import coco_file
from flsl_d2.detection import finetune
from flsl_d2.detection.finetune import main
from flsl_d2.engine.config_files import load_lazy_config
from flsl_d2.model_zoo import get_config
from flsl_d2.modeling import FLSLViT
from flsl_d2.scenes import make_scenes
from flsl_d2.weights import write_encoder

ENCODER = {"img_size": 56, "patch_size": 14, "embed_dim": 32, "depth": 1, "num_heads": 2}
RECIPES, SMALL_HEADS = finetune._RECIPES, finetune._small_heads
IDS = {1: 5, 2: 7, 3: 11, 4: 12, 5: 18, 6: 90}  # category ids with gaps, as COCO's


@pytest.fixture(autouse=True)
def _thin(monkeypatch):
    recipe = str(Path(__file__).with_name("thin_mask_rcnn.py"))
    monkeypatch.setattr(finetune, "_RECIPES", {"masks": recipe, "boxes": recipe})
    monkeypatch.setattr(finetune, "_small_heads", lambda _: [])  # its heads are smaller


@pytest.fixture(scope="module")
def scenes(tmp_path_factory) -> Path:
    """Drawn scenes, and an encoder whose patches of 14 pixels no pyramid takes."""
    root = tmp_path_factory.mktemp("scenes") / "scenes"
    make_scenes(root, num_train=6, num_val=2, image_size=(96, 80))
    file = root / "annotations" / "instances_train.json"
    content = json.loads(file.read_text())
    for category in content["categories"]:
        category["id"] = IDS[category["id"]]
    for annotation in content["annotations"]:
        annotation["category_id"] = IDS[annotation["category_id"]]
    content["categories"].append({"id": 91, "name": "nothing"})
    (root / "all.json").write_text(json.dumps(content))
    torch.manual_seed(0)
    write_encoder(FLSLViT(**ENCODER), root / "encoder.pth")
    return root


def arguments(scenes: Path, output: Path, **changed: str) -> list[str]:
    given = {
        "annotations": scenes / "all.json",
        "images": scenes / "train",
        "weights": scenes / "encoder.pth",
        "output": output,
        "device": "cpu",
        "short-side": 64,
        "max-iter": 3,
        **{key.replace("_", "-"): value for key, value in changed.items()},
    }
    return [text for key, value in given.items() for text in (f"--{key}", str(value))]


def test_a_run_leaves_detector_report_and_config_and_can_be_repeated(
    scenes, tmp_path, run_main, monkeypatch
):
    parsed: list[str] = []
    read = coco_file.read_json
    monkeypatch.setattr(
        coco_file, "read_json", lambda path: (parsed.append(str(path)), read(path))[1]
    )
    monkeypatch.setattr(coco_file, "_SETTLED", -(10**12))  # the scenes were written just before
    status, out, err = run_main(main, *arguments(scenes, tmp_path / "a", val_share="0.34"))
    assert status == 0, err
    assert parsed == [str(scenes / "all.json")]  # once, for checks, training, evaluation, report
    folder = tmp_path / "a"
    assert "from 14 pixels and 3 channels to 16 pixels" in out
    assert "4 images to train on" in out
    assert "2 images to validate on (split off by image with seed 0)" in out
    assert "no training image has an object of nothing" in out
    assert "finds nearly nothing" in out
    assert "The run has 3 steps of 1 images" in out
    assert f"-m flsl_d2.detection.predict --model {folder}" in out
    for name in ("labels", "curves"):
        assert Image.open(folder / f"{name}.png").size[0] > 100
    page = (folder / "report.html").read_text()
    assert "Detector in a" in page
    assert (page.count("data:image/png"), page.count("data:image/jpeg")) == (2, 2)
    figures = json.loads((folder / "results.json").read_text())["figures"]
    # The report's figures are those of Detectron2's evaluation of the same weights.
    rows = [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]
    best = json.loads((folder / "best.json").read_text())
    (row,) = [row for row in rows if "segm/AP" in row and row["iteration"] == best["iteration"]]
    assert best["value"] == row["segm/AP"]
    # Two evaluators add up the same matches in float64; the figures are in per cent.
    for name in ("bbox/AP", "segm/AP", "bbox/AP50", "segm/AP75"):
        assert figures[name] == pytest.approx(row[name], abs=1e-6)
    found = json.loads((folder / "detections.json").read_text())
    assert found
    assert {entry["category_id"] for entry in found} <= {*IDS.values(), 91}
    predictor = Predictor(folder, device="cpu")
    assert predictor.category_ids == [*IDS.values(), 91]
    assert predictor.class_names[0] == "disc"
    cfg = load_lazy_config(str(folder / "finetune.py"))
    assert cfg.train.max_iter == 3
    assert cfg.model.backbone.net.patch_size == 16
    assert cfg.lr_multiplier.warmup_length * cfg.train.max_iter < 1

    # Resuming a run that is complete reports again.
    status, out, err = run_main(main, "--output", str(folder), "--resume")
    assert status == 0, err
    assert "Going on with" in out
    assert json.loads((folder / "results.json").read_text())["figures"] == pytest.approx(
        figures, nan_ok=True
    )

    # The same seed gives the same weights.
    monkeypatch.setattr(finetune, "_report", lambda *_: None)
    status, _, err = run_main(main, *arguments(scenes, tmp_path / "b", val_share="0.34"))
    assert status == 0, err
    weights = [
        torch.load(tmp_path / name / "model_final.pth", weights_only=True)["model"] for name in "ab"
    ]
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])


@pytest.mark.parametrize("has_masks", [True, False])
def test_small_heads_fit_the_recipes(has_masks):
    cfg = get_config(RECIPES["masks" if has_masks else "boxes"])
    for key, value, _ in SMALL_HEADS(has_masks):
        OmegaConf.update(cfg, key, value)
    cfg.model.backbone.net.update(depth=1, embed_dim=32, num_heads=1, window_size=0)
    model = instantiate(cfg.model).eval()
    image = torch.zeros(3, 64, 96, dtype=torch.uint8)
    with torch.no_grad():
        (found,) = model([{"image": image, "height": 64, "width": 96}])
    assert found["instances"].has("pred_masks") == has_masks
    full = instantiate(get_config(RECIPES["masks" if has_masks else "boxes"]).model.roi_heads)
    assert _size(model.roi_heads) < 0.4 * _size(full)


def _size(module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_images_of_four_channels_and_sixteen_bits(scenes, tmp_path, run_main):
    tifffile = pytest.importorskip("tifffile")
    content = json.loads((scenes / "all.json").read_text())
    rng = np.random.default_rng(0)
    for image in content["images"]:
        rgb = np.asarray(Image.open(scenes / "train" / image["file_name"])).astype(np.uint16)
        image["file_name"] = f"{Path(image['file_name']).stem}.tif"
        more = rng.integers(0, 4096, (*rgb.shape[:2], 1)).astype(np.uint16)
        pixels = np.concatenate([16 * rgb, more], axis=2)
        tifffile.imwrite(tmp_path / image["file_name"], pixels, photometric="minisblack",
                         planarconfig="contig")  # fmt: skip
    (tmp_path / "all.json").write_text(json.dumps(content))
    output = tmp_path / "out"
    options = {"annotations": tmp_path / "all.json", "images": tmp_path, "max_iter": "1"}
    status, out, err = run_main(main, *arguments(scenes, output, **options), "--freeze")
    assert status == 0, err
    assert "Images of 4 channels and 16 bits" in out
    assert "to 16 pixels and 4 channels" in out
    cfg = load_lazy_config(str(output / "finetune.py"))
    assert len(cfg.model.pixel_mean) == 4
    # The fourth channel is uniform from 0 to 4095.
    assert cfg.model.pixel_mean[3] == pytest.approx(2048, rel=0.02)
    assert cfg.model.pixel_std[3] == pytest.approx(4096 / 12**0.5, rel=0.02)
    predictor = Predictor(output, device="cpu", score_threshold=0.0)
    file = str(tmp_path / content["images"][0]["file_name"])
    (from_file,), (from_array,) = predictor(file), predictor(tifffile.imread(file))
    np.testing.assert_array_equal(from_file.boxes, from_array.boxes)


def test_what_cannot_be_done_is_one_sentence_and_nothing_is_written(scenes, tmp_path, run_main):
    content = json.loads((scenes / "all.json").read_text())

    def changed(name: str, **lists: Any) -> Path:
        (tmp_path / name).write_text(json.dumps({**content, **lists}))
        return tmp_path / name

    crowds = [{**a, "iscrowd": 1} for a in content["annotations"]]
    one = content["images"][0]["id"]
    of_one = [a for a in content["annotations"] if a["image_id"] == one]
    single = changed("one.json", images=content["images"][:1], annotations=of_one)
    boxes = [{k: v for k, v in a.items() if k != "segmentation"} for a in content["annotations"]]
    other = [{**c, "name": c["name"].upper()} for c in content["categories"]]
    cases = {
        "--annotations must be given": {"annotations": ""},
        "is not a folder": {"images": tmp_path / "none"},
        "do not exist": {"annotations": tmp_path / "none.json"},
        "weights": {"weights": tmp_path / "none.pth"},
        "annotations": {"annotations": changed("empty.json", annotations=[])},
        "nothing is left to learn": {"annotations": changed("crowds.json", annotations=crowds)},
        "too few": {"annotations": single},
        "val.json": {"val_annotations": changed("val.json", annotations=[])},
        "differ; both need": {"val_annotations": changed("other.json", categories=other)},
        "--task boxes": {"annotations": changed("boxes.json", annotations=boxes), "task": "masks"},
        "between 0 and 1": {"val_share": 2},
        "no regular expression": {"val_group": "("},
        "of at least 0": {"max_iter": -1},
    }
    for sentence, changes in cases.items():
        output = tmp_path / "out"
        status, _, err = run_main(main, *arguments(scenes, output, **changes))
        assert status == 2, sentence
        assert sentence in err
        assert "Traceback" not in err
        assert not output.exists(), sentence
    status, _, err = run_main(main, *arguments(scenes, tmp_path))
    assert status == 2
    assert "which exists; go on with the run in it by --resume" in err
    status, _, err = run_main(main, "--output", str(tmp_path), "--resume")
    assert status == 2
    assert "no run of this tool" in err
