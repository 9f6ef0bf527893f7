"""Predictions: equal to Detectron2's own, in the image's pixels, of files, tiles and videos."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from detectron2.config import LazyConfig, instantiate
from detectron2.engine import DefaultPredictor
from detectron2.modeling import build_model
from PIL import Image

from flsl_d2.data.scenes import render_scene
from flsl_d2.detection.predict import main, predict_video
from flsl_d2.detection.predictor import Detections, Predictor, _corners
from flsl_d2.detection.setup import CLASSES_FILE
from flsl_d2.detection.yaml import load_yaml_config
from flsl_d2.engine.config_files import load_lazy_config
from flsl_d2.errors import InputError

NAMES = ["disc", "ring", "star", "triangle", "box", "cross"]


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory) -> Path:
    """The folder of a run whose tiny detector finds something: its scores are spread by hand."""
    folder = tmp_path_factory.mktemp("run")
    cfg = load_lazy_config(
        "demo/mask_rcnn_flsl_vit_scenes.py",
        ["model.backbone.net.depth=1", "model.roi_heads.box_predictor.test_score_thresh=0.0"],
    )
    LazyConfig.save(cfg, str(folder / "config.yaml"))
    torch.manual_seed(0)
    model = instantiate(cfg.model)
    torch.nn.init.normal_(model.roi_heads.box_predictor.cls_score.weight, std=1.0)
    torch.save({"model": model.state_dict()}, folder / "model_final.pth")
    (folder / CLASSES_FILE).write_text(json.dumps(NAMES))
    return folder


@pytest.fixture(scope="module")
def scenes(tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("scenes")
    files = []
    for index, size in enumerate([(128, 96), (110, 150)]):
        scene = render_scene(np.random.default_rng(index), size)
        files.append(str(folder / f"scene {index}.png"))
        Image.fromarray(scene.image).save(files[-1])
    return files


def test_a_batch_of_files_equals_arrays_one_by_one(run_folder, scenes):
    predictor = Predictor(run_folder, device="cpu", score_threshold=0.2)
    together = predictor(scenes)
    assert sum(map(len, together)) > 0
    for file, found in zip(scenes, together, strict=True):
        pixels = np.asarray(Image.open(file))
        alone = predictor(pixels)[0]
        # Padding in a batch changes what convolutions see at the border of the smaller image.
        assert len(alone) > 0
        assert np.all(np.diff(alone.scores) <= 0)
        assert alone.masks.shape == (len(alone), *pixels.shape[:2])
        assert (alone.boxes[:, 2:] <= [pixels.shape[1], pixels.shape[0]]).all()
        assert set(alone.names) <= set(NAMES)
        assert found.class_names == NAMES


def test_yaml_gives_what_detectron2s_own_predictor_gives(tmp_path, scenes):
    cfg = load_yaml_config(
        "coco/mask_rcnn_flsl_vit_s16_1x.yaml",
        ["MODEL.FLSL_VIT.DEPTH", "1", "MODEL.FLSL_VIT.EMBED_DIM", "48", "MODEL.DEVICE", "cpu",
         "MODEL.FLSL_SFP.OUT_CHANNELS", "32", "MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.0",
         "INPUT.MIN_SIZE_TEST", "128"],
    )  # fmt: skip
    torch.manual_seed(0)
    model = build_model(cfg)
    torch.nn.init.normal_(model.roi_heads.box_predictor.cls_score.weight, std=1.0)
    torch.save({"model": model.state_dict()}, tmp_path / "model_final.pth")
    cfg.MODEL.WEIGHTS = str(tmp_path / "model_final.pth")
    (tmp_path / "config.yaml").write_text(cfg.dump())
    own = Predictor(tmp_path, device="cpu", score_threshold=0.0)(scenes[:1])[0]
    bgr = cv2.imread(scenes[0])
    expected = DefaultPredictor(cfg)(bgr)["instances"]
    # The same detector; only rounding of float32 may differ.
    np.testing.assert_allclose(np.sort(own.scores), np.sort(expected.scores.numpy()), rtol=1e-6)
    np.testing.assert_allclose(
        own.boxes, expected.pred_boxes.tensor[expected.scores.argsort(descending=True, stable=True)]
    )


def test_tiles_cover_the_image_and_one_tile_changes_nothing(run_folder, scenes):
    whole = Predictor(run_folder, device="cpu", score_threshold=0.5)(scenes[0])[0]
    one = Predictor(run_folder, device="cpu", score_threshold=0.5, tile=500)(scenes[0])[0]
    kept = {tuple(box) for box in one.boxes.round(2).tolist()}
    assert kept <= {tuple(box) for box in whole.boxes.round(2).tolist()}
    several = Predictor(run_folder, device="cpu", score_threshold=0.5, tile=64)(scenes[0])[0]
    assert several.masks.shape[1:] == (96, 128)
    seen = np.zeros((96, 128), bool)
    for top, left in _corners(96, 128, 64):
        seen[top : top + 64, left : left + 64] = True
        assert top + 64 <= 96
        assert left + 64 <= 128
    assert seen.all()


def test_results_are_cocos():
    found = Detections(
        np.array([[1, 2, 11, 22]], np.float32), np.array([0.5], np.float32), np.array([1]),
        ["cat", "dog"], np.ones((1, 30, 40), bool),
    )  # fmt: skip
    (entry,) = found.coco_results(7, category_ids=[18, 21])
    assert entry["image_id"] == 7
    assert entry["category_id"] == 21
    assert entry["bbox"] == [1, 2, 10, 20]
    assert entry["segmentation"]["size"] == [30, 40]
    assert found.names == ["dog"]


def test_the_command_line_writes_pictures_results_and_masks(run_folder, scenes, tmp_path, capsys):
    bad = tmp_path / "bad.jpg"
    bad.write_bytes(b"no picture")
    with pytest.raises(SystemExit) as ended:
        main(
            [
                *("--model", str(run_folder), "--input", *scenes, str(bad), "--masks"),
                *("--output", str(tmp_path / "out"), "--device", "cpu"),
                *("--score-threshold", "0.2"),
            ]
        )
    assert ended.value.code == 0
    drawn = sorted((tmp_path / "out" / "drawn").iterdir())
    assert [file.name for file in drawn] == ["000001_scene 0.png", "000002_scene 1.png"]
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert {entry["image_id"] for entry in results} == {1, 2}
    assert len(list((tmp_path / "out" / "masks").iterdir())) == len(results)
    images = json.loads((tmp_path / "out" / "images.json").read_text())
    assert images["failed"] == 1
    assert "2 images" in capsys.readouterr().out


def test_a_video_keeps_its_frames(run_folder, tmp_path):
    file = tmp_path / "clip.mp4"
    writer = cv2.VideoWriter(str(file), cv2.VideoWriter.fourcc(*"mp4v"), 10.0, (128, 96))
    for index in range(3):
        writer.write(render_scene(np.random.default_rng(index), (128, 96)).image)
    writer.release()
    out = predict_video(Predictor(run_folder, device="cpu"), file, tmp_path / "out")
    reader = cv2.VideoCapture(str(out))
    frames = 0
    while reader.read()[0]:
        frames += 1
    assert frames == 3


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--input", "nowhere.jpg"], "neither a file nor a folder"),
        (["--input", "{tmp}"], "holds no image file"),
        (["--input", "{scene}", "--model", "{tmp}"], "holds no config.yaml"),
        (["--input", "{clip}"], "cannot be decoded"),
    ],
)
def test_what_cannot_be_done_is_one_sentence(
    run_folder, scenes, tmp_path, capsys, arguments, sentence
):
    clip = tmp_path / "clip" / "broken.mp4"
    clip.parent.mkdir()
    clip.write_bytes(b"no video")
    empty = tmp_path / "empty"
    empty.mkdir()
    values = {"tmp": str(empty), "scene": scenes[0], "clip": str(clip)}
    filled = [text.format(**values) for text in arguments]
    out = tmp_path / "out"
    with pytest.raises(SystemExit) as ended:
        main(["--model", str(run_folder), "--output", str(out), "--device", "cpu", *filled])
    assert ended.value.code == 2
    assert sentence in capsys.readouterr().err
    assert not out.exists()


def test_a_folder_without_a_checkpoint(run_folder, tmp_path):
    (tmp_path / "config.yaml").write_text((run_folder / "config.yaml").read_text())
    with pytest.raises(InputError, match="no checkpoint yet"):
        Predictor(tmp_path, device="cpu")
