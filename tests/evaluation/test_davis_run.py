"""DAVIS as a whole on small videos made here: files, scores, failures, and the command itself."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from forked import run_tool
from PIL import Image
from test_davis_propagation import slow_propagate
from torch import Tensor, nn
from torch.nn import functional as F

from flsl_d2.errors import InputError
from flsl_d2.evaluation.davis.propagation import Propagation, frame_size, segment_sequence
from flsl_d2.evaluation.davis.run import DavisRun, evaluate_davis, run_davis, score_sequence
from flsl_d2.evaluation.davis.sequences import (
    davis_palette,
    find_sequence,
    read_mask,
    sequence_names,
    write_indexed_png,
)
from flsl_d2.modeling import FLSLViT, InputFormat
from flsl_d2.weights import write_encoder

HEIGHT, WIDTH = 96, 160
COLOURS = ((40, 60, 200), (220, 60, 40), (60, 210, 80))  # background and two objects, RGB


class ColourEncoder(nn.Module):
    """Tokens are the mean colours of patches, so that objects of one colour are easy to follow."""

    patch_size, input_format = 8, InputFormat()

    def __init__(self) -> None:
        super().__init__()
        self.pos_embed = nn.Parameter(torch.zeros(1))
        self.batches: list[int] = []

    def forward_tokens(self, images: Tensor) -> Tensor:
        self.batches.append(len(images))
        return F.avg_pool2d(images, self.patch_size).flatten(2).transpose(1, 2)


def tiny_encoder(patch_size: int = 8) -> FLSLViT:
    torch.manual_seed(0)
    return FLSLViT(
        img_size=4 * patch_size, patch_size=patch_size, embed_dim=32, depth=2, num_heads=2
    ).eval()


def moving_masks(count: int, objects: int = 2) -> np.ndarray:
    """(count, H, W) uint8: squares of 32 pixels that move by 2 and 1 pixels a frame."""
    masks = np.zeros((count, HEIGHT, WIDTH), np.uint8)
    for t in range(count):
        for i in range(objects):
            top, left = 8 + t, 16 + 80 * i + 2 * t
            masks[t, top : top + 32, left : left + 32] = i + 1
    return masks


def write_sequence(
    root: Path, name: str, masks: np.ndarray, frames: np.ndarray | None = None
) -> None:
    """In DAVIS's layout; frames are the masks in colours by default. Adds the name to val.txt."""
    images = root / "JPEGImages" / "480p" / name
    annotations = root / "Annotations" / "480p" / name
    lists = root / "ImageSets" / "2017"
    for folder in (images, annotations, lists):
        folder.mkdir(parents=True, exist_ok=True)
    if frames is None:
        frames = np.array(COLOURS, np.uint8)[np.minimum(masks, len(COLOURS) - 1)]
    for index, (frame, mask) in enumerate(zip(frames, masks, strict=True)):
        cv2.imwrite(str(images / f"{index:05d}.jpg"), frame[..., ::-1])
        write_indexed_png(annotations / f"{index:05d}.png", mask)
    with (lists / "val.txt").open("a") as stream:
        stream.write(f"{name}\n")


def photo_frames(masks: np.ndarray) -> np.ndarray:
    """Each object is a patch of noise that moves with its mask over a still background."""
    rng = np.random.default_rng(0)
    textures = [
        cv2.GaussianBlur(rng.integers(0, 256, (HEIGHT, WIDTH, 3)).astype(np.uint8), (5, 5), 0)
        for _ in range(3)
    ]
    frames = np.repeat(textures[0][None], len(masks), axis=0)
    for t, mask in enumerate(masks):
        for i in range(1, int(mask.max()) + 1):
            moved = np.roll(textures[i], (t, 2 * t), (0, 1))
            frames[t][mask == i] = moved[mask == i]
    return frames


@pytest.fixture
def davis(tmp_path: Path) -> Path:
    root = tmp_path / "DAVIS"
    write_sequence(root, "squares", moving_masks(6))
    write_sequence(root, "noise", moving_masks(5, 1), photo_frames(moving_masks(5, 1)))
    return root


def small_run(davis: Path, **changes) -> DavisRun:
    settings = {"output": davis.parent / "out", "short_side": HEIGHT, "batch_size": 4}
    return DavisRun(**({"root": davis} | settings | changes))


@pytest.mark.parametrize(
    ("size", "short_side", "patch", "expected"),
    [
        ((480, 854), 480, 16, (480, 832)),
        ((480, 854), 480, 8, (480, 832)),
        ((480, 854), 480, 14, (476, 854)),
        ((854, 480), 480, 16, (832, 480)),
        ((480, 854), 224, 16, (224, 384)),
        ((480, 500), 100, 16, (96, 96)),
    ],
)
def test_frame_sizes(size: tuple, short_side: int, patch: int, expected: tuple) -> None:
    assert frame_size(size, short_side, patch) == expected


def test_objects_with_a_colour_of_their_own_are_followed(davis: Path) -> None:
    """What is reported is what the written masks score, averaged over objects, not sequences."""
    run = small_run(davis)
    results = evaluate_davis(ColourEncoder(), run)
    assert not results.failed
    for name, objects in results.objects.items():
        sequence = find_sequence(davis, "480p", name)
        masks = [read_mask(path) for path in sorted((run.output / "masks" / name).iterdir())]
        assert (masks[0] == read_mask(sequence.masks[0])).all()
        for number, scores in score_sequence(sequence, masks).items():
            np.testing.assert_array_equal(scores, objects[number])
            # 8-pixel tokens cannot draw a 32-pixel square better.
            assert name == "noise" or (scores[0, 0] > 0.75 and scores[0, 1] == 1)
    content = results.as_json()
    expected = np.mean(results.every, axis=0)
    assert content["overall"]["J"]["mean"] == pytest.approx(expected[0, 0])
    assert content["overall"]["F"]["decay"] == pytest.approx(expected[1, 2])
    assert content["overall"]["J&F"] == pytest.approx(expected[:, 0].mean())
    assert content["counts"] == {"objects": 3, "sequences": 2, "failed": 0}


def test_first_and_last_frame_do_not_count(davis: Path) -> None:
    sequence = find_sequence(davis, "480p", "squares")
    masks = list(moving_masks(6))
    masks[0], masks[-1] = np.zeros_like(masks[0]), np.zeros_like(masks[0])
    for scores in score_sequence(sequence, masks).values():
        assert scores.tolist() == [[1, 1, 0], [1, 1, 0]]
    masks[1] = np.zeros_like(masks[0])
    # Four frames count, 0, 1, 1, 1; the first quarter is two of them, the last one is two.
    assert score_sequence(sequence, masks)[1][0].tolist() == [0.75, 0.75, -0.5]


def test_an_object_that_is_lost_or_swapped_scores_nothing(davis: Path) -> None:
    sequence = find_sequence(davis, "480p", "squares")
    swapped = np.array([0, 2, 1], np.uint8)[moving_masks(6)]
    for masks in (list(swapped), [np.zeros((HEIGHT, WIDTH), np.uint8)] * 6):
        assert all(scores[0, 0] == 0 for scores in score_sequence(sequence, masks).values())


def test_frames_are_encoded_in_batches(davis: Path) -> None:
    encoder, sequence = ColourEncoder(), find_sequence(davis, "480p", "squares")
    masks = [
        list(segment_sequence(encoder, sequence, short_side=HEIGHT, batch_size=size))
        for size in (4, 100)
    ]
    assert encoder.batches == [4, 2, 6]
    np.testing.assert_array_equal(*masks)


@pytest.mark.parametrize("patch_size", [4, 14, 16])
def test_any_patch_size(davis: Path, patch_size: int) -> None:
    sequence = find_sequence(davis, "480p", "squares")
    masks = list(segment_sequence(tiny_encoder(patch_size), sequence, short_side=HEIGHT))
    assert len(masks) == 6
    assert all(mask.shape == (HEIGHT, WIDTH) and mask.dtype == np.uint8 for mask in masks)
    assert set(np.unique(masks)) <= {0, 1, 2}


def test_a_still_video_keeps_its_first_mask(tmp_path: Path) -> None:
    """Every token's nearest neighbour is itself; only the rounding to tokens remains."""
    mask = np.zeros((128, 192), np.uint8)  # sides that are not resized
    mask[32:96, 64:128] = 1
    texture = np.random.default_rng(0).integers(0, 256, (128, 192, 3)).astype(np.uint8)
    write_sequence(tmp_path, "still", np.stack([mask] * 12), np.stack([texture] * 12))
    sequence = find_sequence(tmp_path, "480p", "still")
    masks = list(segment_sequence(tiny_encoder(), sequence, Propagation(top_k=1), 128))
    for found in masks[1:]:
        np.testing.assert_array_equal(found, masks[1])
    assert (masks[1] == mask).mean() > 0.995


def test_object_numbers_with_a_gap_and_void_pixels(tmp_path: Path, caplog) -> None:
    masks = moving_masks(5)
    frames = np.array(COLOURS, np.uint8)[masks]
    masks[masks == 2] = 3
    masks[:, -8:, -8:] = 255
    write_sequence(tmp_path, "gap", masks, frames)
    sequence = find_sequence(tmp_path, "480p", "gap")
    found = list(segment_sequence(ColourEncoder(), sequence, short_side=HEIGHT))
    assert set(np.unique(found)) == {0, 1, 3}
    scores = score_sequence(sequence, found)
    assert scores[3][0, 0] > 0.75
    assert set(scores) == {1, 3}
    assert "objects 1, 3 of the first mask are scored" in caplog.text


@pytest.mark.parametrize("mode", ["L", "1"])
def test_greyscale_masks_of_davis_2016_have_one_object(mode: str, tmp_path: Path) -> None:
    """Of 0 and 255 only; 255 is void in an indexed file, and beside another object."""
    path, mask = tmp_path / "a.png", moving_masks(1, 1)[0]
    Image.fromarray(255 * mask).convert(mode).save(path)
    np.testing.assert_array_equal(read_mask(path), mask)
    write_indexed_png(path, 255 * mask)
    assert not read_mask(path).any()
    mask[0, :4] = 255
    Image.fromarray(mask).save(path)
    assert set(np.unique(read_mask(path))) == {0, 1}


def test_a_video_against_a_slow_reading_of_the_protocol(tmp_path: Path) -> None:
    """96 x 160 pixels to 64 x 64 (106 cut to 64) to 8 x 8 tokens, frame by frame, in float64."""
    encoder, patch = tiny_encoder(), 8
    frames = photo_frames(moving_masks(6)) // 2
    frames += np.random.default_rng(1).integers(0, 100, frames.shape).astype(np.uint8)  # no ties
    write_sequence(tmp_path, "noisy", moving_masks(6), frames)
    sequence = find_sequence(tmp_path, "480p", "noisy")
    setup = Propagation(radius=3, context=2, top_k=4)
    tokens = []
    for path in sequence.frames:
        image = cv2.resize(cv2.imread(str(path))[..., ::-1], (64, 64)) / 255
        image = (image - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
        with torch.inference_mode():
            found = encoder.forward_tokens(torch.tensor(image).permute(2, 0, 1)[None].float())[0]
        found = found.double().numpy()
        tokens.append(found / np.linalg.norm(found, axis=1, keepdims=True))
    first = moving_masks(1)[0]
    centres = first[6::12, 10::20]  # the middle of each of 8 x 8 patches on the original
    labels = [np.eye(3)[centres.ravel()]]
    found = list(segment_sequence(encoder, sequence, setup, short_side=64))
    for t in range(1, 6):
        used = [0, *range(max(t - 2, 1), t)]
        past = np.array([tokens[i] for i in used]), np.array([labels[i] for i in used])
        labels.append(slow_propagate(tokens[t], *past, (8, 8), setup))
        maps = torch.tensor(labels[-1].T.reshape(1, 3, 8, 8))
        maps = F.interpolate(maps, scale_factor=patch, mode="bilinear")[0].numpy()
        maps = [(m - m.min()) / (m.max() - m.min()) for m in maps]
        small = Image.fromarray(np.argmax(maps, axis=0).astype(np.uint8))
        expected = np.array(small.resize((WIDTH, HEIGHT), Image.Resampling.NEAREST))
        assert len(np.unique(expected)) == 3
        assert np.count_nonzero(found[t] != expected) <= 2  # where two labels are as large


def test_palette_starts_with_the_known_colours() -> None:
    palette = davis_palette().tolist()
    known = [(0, 0, 0), (128, 0, 0), (0, 128, 0), (128, 128, 0), (0, 0, 128), (128, 0, 128)]
    assert [tuple(row) for row in palette[:6]] == known
    assert (palette[8], palette[255]) == ([64, 0, 0], [224, 224, 192])
    assert len({tuple(row) for row in palette}) == 256


def test_masks_are_as_the_server_wants_them(davis: Path) -> None:
    run = small_run(davis)
    evaluate_davis(tiny_encoder(), run)
    assert sorted(p.name for p in (run.output / "masks").iterdir()) == ["noise", "squares"]
    assert Image.open(run.output / "drawn" / "squares.jpg").size == (4 * WIDTH, HEIGHT)
    paths = sorted((run.output / "masks" / "squares").iterdir())
    assert [path.name for path in paths] == [f"{i:05d}.png" for i in range(6)]
    for path in paths:
        header = path.read_bytes()[:26]
        assert header[24:26] == bytes([8, 3])  # PNG: 8 bits a pixel, indexed colour
        with Image.open(path) as image:
            assert (image.mode, image.size) == ("P", (WIDTH, HEIGHT))
            assert image.getpalette() == davis_palette().ravel().tolist()


def test_masks_alone_need_the_first_annotation_alone(davis: Path) -> None:
    for path in (davis / "Annotations").rglob("*.png"):
        if path.name != "00000.png":
            path.unlink()
    run = small_run(davis, score=False)
    results = evaluate_davis(tiny_encoder(), run)
    assert not results.failed
    assert len(list((run.output / "masks" / "squares").iterdir())) == 6
    assert "not scored" in results.table()
    assert json.loads(json.dumps(results.as_json()))["overall"] is None


SMALL = np.zeros((HEIGHT // 2, WIDTH), np.uint8)
# How the frames and masks (folders) are broken, and what is said.
FAILURES = {
    "missing frame": (lambda f, m: (f / "00003.jpg").unlink(), r"00003\.jpg is missing in"),
    "missing frame and mask": (
        lambda f, m: [(f / "00003.jpg").unlink(), (m / "00003.png").unlink()],
        r"00003\.jpg is missing in",
    ),
    "missing last frame": (
        lambda f, m: (f / "00005.jpg").unlink(),
        r"00005\.jpg is missing, though '.*00005\.png' is there",
    ),
    "missing masks": (
        lambda f, m: [(m / f"0000{i}.png").unlink() for i in (2, 3, 4)],
        r"00002\.png and 2 more are missing in",
    ),
    "small mask": (
        lambda f, m: write_indexed_png(m / "00002.png", SMALL),
        r"00002\.png' has 48 x 160 pixels, but the first frame has 96 x 160",
    ),
    "no folder": (lambda f, m: shutil.rmtree(f), "holds no frames"),
    "not an image": (
        lambda f, m: (f / "00001.jpg").write_bytes(b"no picture"),
        r"00001\.jpg' cannot be read",
    ),
    "truncated mask": (
        lambda f, m: os.truncate(m / "00002.png", (m / "00002.png").stat().st_size - 30),
        r"image '.*00002\.png' cannot be read",
    ),
    "truncated frame": (
        lambda f, m: os.truncate(f / "00002.jpg", 900),
        r"image '.*00002\.jpg' cannot be used",
    ),
    "colour mask": (
        lambda f, m: Image.new("RGB", (WIDTH, HEIGHT), "red").save(m / "00002.png"),
        r"00002\.png' has colours",
    ),
    "empty first mask": (
        lambda f, m: write_indexed_png(m / "00000.png", 0 * moving_masks(1)[0]),
        r"00000\.png' has no object",
    ),
    "two frames": (
        lambda f, m: [path.unlink() for path in (*f.glob("*[2-5].jpg"), *m.glob("*[2-5].png"))],
        "the first and the last do not count",
    ),
}


@pytest.mark.parametrize("how", FAILURES)
def test_a_broken_sequence_fails_alone_and_says_why(davis: Path, how: str) -> None:
    run = small_run(davis)
    evaluate_davis(tiny_encoder(), run)
    change, message = FAILURES[how]
    change(*(davis / kind / "480p" / "squares" for kind in ("JPEGImages", "Annotations")))
    results = evaluate_davis(tiny_encoder(), run)
    assert set(results.objects) == {"noise"}
    with pytest.raises(InputError, match=message):
        raise InputError(results.failed["squares"])
    if how not in ("truncated mask", "colour mask"):  # found when scored; the masks are good
        assert not (run.output / "masks" / "squares").exists()
    row = next(line for line in results.table().splitlines() if line.startswith("squares"))
    assert "failed: " in row
    assert "1 of 2 sequences count." in results.table()


def test_numbers_that_rise_by_more_than_one_are_no_gap(tmp_path: Path) -> None:
    write_sequence(tmp_path, "fives", moving_masks(4))
    for kind in ("JPEGImages", "Annotations"):
        paths = sorted((tmp_path / kind / "480p" / "fives").iterdir(), reverse=True)
        for path in paths:
            path.rename(path.with_stem(f"{5 * int(path.stem):05d}"))
    assert len(find_sequence(tmp_path, "480p", "fives").frames) == 4
    for kind, ending in (("JPEGImages", "jpg"), ("Annotations", "png")):
        (tmp_path / kind / "480p" / "fives" / f"00005.{ending}").unlink()
    with pytest.raises(InputError, match=r"00005\.jpg is missing"):
        find_sequence(tmp_path, "480p", "fives")


def test_weights_that_give_no_numbers(davis: Path) -> None:
    encoder = tiny_encoder()
    encoder.final_norm.weight.data.fill_(float("nan"))
    results = evaluate_davis(encoder, small_run(davis))
    assert set(results.failed) == {"squares", "noise"}
    assert "not finite" in results.failed["noise"]
    assert results.as_json()["overall"] is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"split": "test-dev"}, r"splits that exist: "),
        ({"year": "2016"}, "has no folder ImageSets/2016"),
        ({"resolution": "Full-Resolution"}, "has no folder JPEGImages/Full-Resolution"),
        ({"root": Path("nowhere")}, "'nowhere' has no folder"),
        ({"split": "outside"}, "no name of a folder"),
    ],
)
def test_a_split_that_is_not_there(davis: Path, changes: dict, message: str) -> None:
    (davis / "ImageSets" / "2017" / "outside.txt").write_text("squares\n../outside\n")
    with pytest.raises(InputError, match=message):
        run_davis(small_run(davis, **changes), "random", "cpu")


def test_names_are_taken_once_and_blank_lines_left_out(davis: Path) -> None:
    (davis / "ImageSets" / "2017" / "val.txt").write_text("\nsquares\r\n\nsquares\n")
    assert sequence_names(davis, "2017", "val", "480p") == ["squares"]


def test_settings_that_cannot_be(davis: Path) -> None:
    with pytest.raises(InputError, match="less than a patch of 8"):
        evaluate_davis(tiny_encoder(), small_run(davis, short_side=7))
    assert not (davis.parent / "out").exists()
    with pytest.raises(InputError, match="device"):
        run_davis(small_run(davis), "random", "gpu")
    with pytest.raises(InputError, match="batch size is 0"):
        small_run(davis, batch_size=0)


def test_the_command_writes_what_counts_and_ends_with_2(davis: Path, tmp_path: Path) -> None:
    encoder, weights = tiny_encoder(), tmp_path / "encoder.pth"
    write_encoder(encoder, weights)
    arguments = ["--weights", weights, "--davis-root", davis, "--output", tmp_path / "out"]
    arguments += ["--json", tmp_path / "deep" / "davis.json", "--radius", "3", "--top-k", "2"]
    (davis / "JPEGImages" / "480p" / "noise" / "00002.jpg").unlink()

    done = run_tool("eval_davis", *arguments, "--short-side", HEIGHT, "--device", "cpu")
    assert done.returncode == 2
    assert "error: 1 of 2 sequences failed (noise)" in done.stderr
    assert "squares (1 of 1)" in done.stderr  # progress
    assert "noise failed: 00002.jpg is missing" in done.stdout

    content = json.loads((tmp_path / "deep" / "davis.json").read_text())
    assert content["settings"]["propagation"]["radius"] == 3
    assert content["settings"]["encoder"]["patch_size"] == 8
    assert list(content["failed"]) == ["noise"]
    run = small_run(davis, propagation=Propagation(radius=3, top_k=2))
    expected = evaluate_davis(encoder, run).as_json()
    assert content["counts"] == {"objects": 2, "sequences": 1, "failed": 1}
    assert content["overall"]["J"] == pytest.approx(expected["overall"]["J"])
