"""Predictions: equal to Detectron2's own, in the image's pixels, of files, tiles and videos."""

from __future__ import annotations

import json
import os
import shutil
from functools import cache
from pathlib import Path

import cv2
import detectron2.data.transforms as T
import numpy as np
import pycocotools.mask as mask_util
import pytest
import torch
from detectron2.config import LazyConfig, instantiate
from detectron2.engine import DefaultPredictor
from detectron2.structures import Boxes, Instances
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from flsl_d2.detection.detections import Detections, MaskCrops
from flsl_d2.detection.model_folder import MODEL_FILE, write_description
from flsl_d2.detection.predict import main, predict_video
from flsl_d2.detection.predictor import Predictor, corners
from flsl_d2.detection.setup import CLASSES_FILE
from flsl_d2.detection.yaml_training import load_yaml_config
from flsl_d2.engine.config_files import load_lazy_config
from flsl_d2.errors import InputError
from flsl_d2.images.video import Video, VideoWriter
from flsl_d2.scenes import render_scene
from flsl_d2.weights import write_encoder
from tests.hostile import HOSTILE, as_file_name

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
    write_description(cfg, folder)
    torch.manual_seed(0)
    model = instantiate(cfg.model)
    torch.nn.init.normal_(model.roi_heads.box_predictor.cls_score.weight, std=1.0)
    torch.save({"model": model.state_dict()}, folder / "model_final.pth")
    categories = [{"id": 10 * i + 3, "name": name} for i, name in enumerate(NAMES)]
    content = {"version": "0.0.9", "categories": categories}
    (folder / CLASSES_FILE).write_text(json.dumps(content))
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


def test_slices_cover_the_image_and_small_pictures_are_taken_whole(run_folder, scenes):
    predictor = Predictor(run_folder, device="cpu", score_threshold=0.2)
    whole = predictor(scenes)
    predictor.slice_side = 150
    sliced = predictor(scenes)
    for one, other in zip(whole, sliced, strict=True):
        np.testing.assert_array_equal(one.boxes, other.boxes)
        np.testing.assert_array_equal(one.masks, other.masks)
    predictor.slice_side = 64
    one_by_one = predictor(scenes[0])[0]
    predictor.batch_size = 3
    several = predictor(scenes[0])[0]
    # Pixels; a batch of another size takes other kernels in float32.
    np.testing.assert_allclose(several.boxes, one_by_one.boxes, atol=1e-3)
    assert several.masks.shape[1:] == (96, 128)
    assert (np.diff(several.scores) <= 0).all()
    for overlap in (0.0, 0.2, 0.9):
        seen = np.zeros((96, 128), bool)
        for top, left in corners(96, 128, 64, overlap):
            seen[top : top + 64, left : left + 64] = True
            assert top + 64 <= 96
            assert left + 64 <= 128
        assert seen.all()


class Squares:
    """A detector that reports each white square it sees, cut where the slice cuts it."""

    def __call__(self, inputs):
        outputs = []
        for each in inputs:
            white = (each["image"][0] > 128).numpy().astype(np.uint8)
            _, _, stats, _ = cv2.connectedComponentsWithStats(white)
            boxes = [[x, y, x + w, y + h] for x, y, w, h, _ in stats[1:].tolist()]
            found = Instances((each["height"], each["width"]))
            found.pred_boxes = Boxes(torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4))
            # Cut squares have the higher scores, as if a slice were easier.
            areas = found.pred_boxes.area()
            found.scores = 1 / (1 + areas / 1000)
            found.pred_classes = torch.zeros(len(boxes), dtype=torch.int64)
            outputs.append({"instances": found})
        return outputs


@settings(max_examples=25)
@given(
    st.lists(st.tuples(st.integers(0, 9), st.integers(0, 7), st.integers(3, 17)), max_size=12),
    st.integers(40, 250),
    st.floats(0, 0.9),
    st.integers(1, 4),
)
def test_an_object_in_several_slices_is_reported_once_and_whole(
    run_folder, squares, side, overlap, batch_size
):
    predictor = _shared_predictor(run_folder)
    image = np.zeros((160, 200, 3), np.uint8)
    for column, row, size in squares:
        image[20 * row + 1 : 20 * row + 1 + size, 20 * column + 1 : 20 * column + 1 + size] = 255
    predictor.slice_side, predictor.overlap, predictor.batch_size = side, overlap, batch_size
    sliced = predictor(image)[0]
    predictor.slice_side = 0
    whole = predictor(image)[0]
    assert sorted(sliced.boxes.tolist()) == sorted(whole.boxes.tolist())


@cache
def _shared_predictor(run_folder: Path) -> Predictor:
    predictor = Predictor(run_folder, device="cpu", score_threshold=0.0)
    predictor.model, predictor.resize = Squares(), T.AugmentationList([])
    return predictor


def test_both_kinds_of_configs_give_what_detectron2s_own_predictor_gives(scenes, tmp_path):
    """The recipe and its YAML twin, made small alike, with the same weights."""
    lazy = load_lazy_config(
        "coco/mask_rcnn_flsl_vit_s16_1x.py",
        [
            "model.backbone.net={embed_dim:32,depth:1,num_heads:2,img_size:80}",
            "dataloader.test.mapper.augmentations.0.short_edge_length=96",
            "model.proposal_generator.post_nms_topk=[20,20]",
            "model.roi_heads.num_classes=6",
            "model.roi_heads.box_head={conv_dims:[16],fc_dims:[32]}",
            "model.roi_heads.box_predictor={test_score_thresh:0.0,input_shape:{channels:32}}",
            "model.roi_heads.mask_head.conv_dims=[16,16]",
        ],
    )
    yaml_cfg = load_yaml_config(
        "coco/mask_rcnn_flsl_vit_s16_1x.yaml",
        [
            *("MODEL.FLSL_VIT.EMBED_DIM", "32", "MODEL.FLSL_VIT.DEPTH", "1"),
            *("MODEL.FLSL_VIT.NUM_HEADS", "2", "MODEL.FLSL_VIT.IMG_SIZE", "80"),
            *("INPUT.MIN_SIZE_TEST", "96", "MODEL.RPN.POST_NMS_TOPK_TEST", "20"),
            *("MODEL.ROI_HEADS.NUM_CLASSES", "6", "MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.0"),
            *("MODEL.ROI_BOX_HEAD.NUM_CONV", "1", "MODEL.ROI_BOX_HEAD.CONV_DIM", "16"),
            *("MODEL.ROI_BOX_HEAD.FC_DIM", "32", "MODEL.ROI_MASK_HEAD.NUM_CONV", "1"),
            *("MODEL.ROI_MASK_HEAD.CONV_DIM", "16", "MODEL.DEVICE", "cpu"),
        ],
    )
    torch.manual_seed(0)
    model = instantiate(lazy.model)
    torch.nn.init.normal_(model.roi_heads.box_predictor.cls_score.weight, std=1.0)
    file = str(tmp_path / "weights.pth")
    torch.save({"model": model.state_dict()}, file)
    found = []
    for name in ("lazy", "yaml"):
        (tmp_path / name).mkdir()
        if name == "lazy":
            write_description(lazy, tmp_path / name)
        else:
            (tmp_path / name / "config.yaml").write_text(yaml_cfg.dump())
        found.append(Predictor(tmp_path / name, file, "cpu", score_threshold=0.0)(scenes[0])[0])
    assert len(found[0]) > 0
    for field in ("boxes", "scores", "classes", "masks"):
        np.testing.assert_array_equal(getattr(found[0], field), getattr(found[1], field))
    yaml_cfg.MODEL.WEIGHTS = file
    expected = DefaultPredictor(yaml_cfg)(cv2.imread(scenes[0]))["instances"]
    order = expected.scores.argsort(descending=True, stable=True)
    # The same operations on the same batch of one image, in float32.
    np.testing.assert_allclose(found[1].scores, expected.scores[order].numpy(), rtol=1e-6)
    np.testing.assert_allclose(found[1].boxes, expected.pred_boxes.tensor[order], rtol=1e-6)


def test_the_command_line_writes_pictures_results_and_masks(run_folder, scenes, tmp_path, capsys):
    bad = tmp_path / "bad.jpg"
    bad.write_bytes(b"no picture")
    options = ("--masks", "--output", tmp_path / "out", "--score-threshold", "0.2")
    assert predict("--model", run_folder, "--input", *scenes, scenes[0], bad, *options) == 0
    drawn = sorted((tmp_path / "out" / "drawn").iterdir())
    assert [file.name for file in drawn] == ["000001_scene 0.png", "000002_scene 1.png"]
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    ids = {entry["category_id"] for entry in results}
    assert ids <= {10 * i + 3 for i in range(6)}  # those of the data set
    assert {entry["image_id"] for entry in results} == {1, 2}
    assert len(list((tmp_path / "out" / "masks").iterdir())) == len(results)
    images = json.loads((tmp_path / "out" / "images.json").read_text())
    assert images["failed"] == 1
    assert images["categories"][1] == {"id": 13, "name": "ring"}
    assert "2 images" in capsys.readouterr().out


def write_clip(path: Path, times: list[float], size: tuple[int, int] = (96, 128)) -> None:
    writer = VideoWriter(path, size, 10.0)
    for index, time in enumerate(times):
        writer.write(render_scene(np.random.default_rng(index), size[::-1]).image, time)
    writer.close()


def predict(*arguments: object) -> int:
    with pytest.raises(SystemExit) as ended:
        main([*map(str, arguments), "--device", "cpu"])
    return int(ended.value.code or 0)


def test_a_video_keeps_its_times_and_every_frame_has_a_line(run_folder, tmp_path):
    times = [0.0, 0.1, 0.9, 1.0, 2.5]
    write_clip(tmp_path / "clip.bin", times)  # the content decides
    predictor = Predictor(run_folder, device="cpu", score_threshold=0.2, batch_size=2)
    out = predict_video(predictor, tmp_path / "clip.bin", tmp_path / "out")
    written = Video(out)
    assert [frame.time for frame in written] == pytest.approx(times, abs=1e-3)
    assert written.size[0] >= 384
    lines = [json.loads(line) for line in out.with_suffix(".jsonl").read_text().splitlines()]
    assert [line["time"] for line in lines] == pytest.approx(times, abs=1e-3)
    assert [line["frame"] for line in lines] == list(range(5))
    frame = next(iter(Video(tmp_path / "clip.bin"))).pixels
    alone = predictor(frame)[0]
    assert len(lines[0]["detections"]) == len(alone) > 0
    assert lines[0]["detections"][0]["category"] in NAMES


def test_damaged_frames_are_counted_and_passed(run_folder, tmp_path, caplog):
    write_clip(tmp_path / "clip.mp4", [i / 10 for i in range(20)])
    content = bytearray((tmp_path / "clip.mp4").read_bytes())
    start = content.index(b"mdat")
    for place in range(start + 2000, start + 2600):
        content[place] ^= 0x5A
    (tmp_path / "clip.mp4").write_bytes(content)
    out = predict_video(Predictor(run_folder, device="cpu"), tmp_path / "clip.mp4", tmp_path)
    assert len(out.with_suffix(".jsonl").read_text().splitlines()) >= 10
    assert "damaged parts were passed over" in caplog.text


def test_inputs_of_one_name_and_hostile_names_have_outputs_of_their_own(run_folder, tmp_path):
    inputs = []
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        write_clip(tmp_path / folder / "front.mp4", [0.0, 0.1])
        inputs.append(tmp_path / folder / "front.mp4")
    for number, text in enumerate(HOSTILE):
        inputs.append(tmp_path / "a" / f"{number} {as_file_name(text)}")
        Image.new("RGB", (32, 32)).save(inputs[-1], "PNG")
    out = tmp_path / "out"
    assert predict("--model", run_folder, "--input", *inputs, "--output", out) == 0
    assert len(list(out.glob("front_detections*.mp4"))) == 2
    assert len(list(out.glob("front*_detections*.jsonl"))) == 2
    drawn = list((out / "drawn").iterdir())
    assert len(drawn) == len(HOSTILE)
    assert all(len(os.fsencode(path.name)) < 255 and path.name.isprintable() for path in drawn)
    assert not Path("ran.txt").exists()


def test_results_are_written_though_drawing_fails(run_folder, scenes, tmp_path, monkeypatch):
    def fail(*_):
        raise ValueError("no font")

    monkeypatch.setattr(Detections, "drawn_on", fail)
    options = ("--score-threshold", "0.2", "--output", tmp_path / "out")
    assert predict("--model", run_folder, "--input", *scenes, *options) == 0
    assert json.loads((tmp_path / "out" / "results.json").read_text())


def test_pictures_of_any_kind_are_taken(run_folder, scenes, tmp_path):
    predictor = Predictor(run_folder, device="cpu", score_threshold=0.2)
    pixels = np.asarray(Image.open(scenes[0]))
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels).rotate(90, expand=True).save(tmp_path / "turned.png", exif=exif)
    kinds = [scenes[0], Path(scenes[0]), pixels, Image.open(scenes[0])]
    for kind in [*kinds, Image.open(tmp_path / "turned.png"), str(tmp_path / "turned.png")]:
        np.testing.assert_array_equal(predictor(kind)[0].boxes, predictor(pixels)[0].boxes)
    with pytest.raises(InputError, match="is a folder; give its files"):
        predictor(str(tmp_path))
    with pytest.raises(InputError, match="cannot be read"):
        predictor("http://127.0.0.1:9/x.png")


def test_a_folder_is_data(run_folder, scenes, tmp_path):
    """A config of a folder is a program, which is run where the user trusts it alone."""
    folder = tmp_path / "run"
    shutil.copytree(run_folder, folder)
    text = (folder / "config.yaml").read_text()
    ran = tmp_path / "ran.txt"
    hostile = f"{text}\nevil: !!python/object/apply:os.system ['touch {ran}']\n"
    (folder / "config.yaml").write_text(hostile)
    Predictor(folder, device="cpu")  # from model.json
    (folder / MODEL_FILE).unlink()
    with pytest.raises(InputError, match=r"--trust-config"):
        Predictor(folder, device="cpu")
    assert not ran.exists()
    (folder / "config.yaml").write_text(text)
    found = Predictor(folder, device="cpu", trust_config=True)(scenes[0])[0]
    np.testing.assert_array_equal(
        found.boxes, Predictor(run_folder, device="cpu")(scenes[0])[0].boxes
    )


@settings(max_examples=50)
@given(st.integers(0, 2**32), st.integers(1, 12), st.integers(1, 12))
def test_crops_are_the_masks(seed, height, width):
    rng = np.random.default_rng(seed)
    masks = rng.random((3, height, width)) < rng.choice([0.0, 0.2, 0.9, 1.0])
    crops = MaskCrops.of_arrays(masks)
    np.testing.assert_array_equal(np.asarray(crops), masks)
    for code, mask in zip(crops.run_lengths(), masks, strict=True):
        np.testing.assert_array_equal(mask_util.decode(code), mask)
        assert code == {**(own := mask_util.encode(np.asfortranarray(mask, np.uint8))),
                        "counts": own["counts"].decode()}  # fmt: skip
    moved = crops.moved(2, 3, (height + 5, width + 4))
    np.testing.assert_array_equal(moved[0][3 : 3 + height, 2 : 2 + width], masks[0])
    assert np.asarray(moved).sum() == masks.sum()


def test_many_masks_of_a_large_picture_take_little_memory():
    """1,000 objects of 100 pixels a side in 8,000 x 8,000: 64 GB as masks of the whole picture."""
    size, count = (8000, 8000), 1000
    corners_of = np.random.default_rng(0).integers(0, 7900, (count, 2)).astype(np.float32)
    boxes = np.concatenate([corners_of, corners_of + 100], axis=1)
    masks = MaskCrops.of_predictions(torch.ones(count, 1, 28, 28), torch.tensor(boxes), size)
    found = Detections(boxes, np.ones(count, np.float32), np.zeros(count, int), ["a"], masks)
    assert sum(crop.pixels.nbytes for crop in masks.crops) < 20e6
    assert mask_util.area(found.coco_results(1)[0]["segmentation"]) == pytest.approx(1e4, rel=0.05)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--input", "nowhere.jpg"], "does not exist"),
        (["--input", "{tmp}"], "holds no image file"),
        (["--input", "{scene}", "--model", "{tmp}"], "no model.json and no config.yaml"),
        (["--input", "{scene}", "--model", "{encoder}"], "is an encoder and no detector"),
        (["--input", "{scene}", "--model", "{scene}"], "is no folder of a run"),
        (["--input", "{scene}", "--max-pixels", "0"], "--max-pixels is 0"),
        (["--input", "{clip}"], "cannot be decoded"),
        (["--input", "{scene}", "{clip}"], "cannot be decoded"),
        (["--input", "{tmp}.mp4"], "does not exist"),
        (["--input", "{scene}", "--overlap", "1"], "give a share of a slice"),
        (["--input", "{scene}", "--slice", "-1"], "--slice is -1"),
        (["--input", "{scene}", "--weights", "{encoder}"], "hold an encoder and no detector"),
        (["--input", "{scene}", "--model", "{old}"], "was made by flsl-d2 0.0.9"),
        (["--input", "{scene}", "--model", "{new}"], "no checkpoint yet"),
    ],
)
def test_what_cannot_be_done_is_one_sentence(
    run_folder, scenes, tmp_path, capsys, arguments, sentence
):
    clip, empty, old, new = (tmp_path / name for name in ("clip", "empty", "old", "new"))
    for folder in (clip, empty, old, new):
        folder.mkdir()
    clip /= "broken.mp4"
    clip.write_bytes(b"no video")
    shutil.copy(run_folder / MODEL_FILE, new)
    content = json.loads((run_folder / MODEL_FILE).read_text())
    content["model"]["backbone"]["net"]["shape_of_old_times"] = 3
    (old / MODEL_FILE).write_text(json.dumps(content))
    for name in (CLASSES_FILE, "model_final.pth"):
        (old / name).symlink_to(run_folder / name)
    encoder = tmp_path / "encoder.pth"
    net = LazyConfig.load(str(run_folder / "config.yaml")).model.backbone.net
    write_encoder(instantiate(net), encoder)
    values = {"tmp": empty, "scene": scenes[0], "clip": clip, "old": old, "new": new}
    values["encoder"] = encoder
    filled = [text.format(**values) for text in arguments]
    out = tmp_path / "out"
    assert predict("--model", run_folder, "--output", out, *filled) == 2
    assert sentence in capsys.readouterr().err
    assert not out.exists()
