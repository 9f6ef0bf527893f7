"""tools/visualize.py as a command: its files, its numbers, and what it says about bad input."""

from __future__ import annotations

import argparse
import base64
import json
import re
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from forked import run_tool

from flsl_d2.errors import InputError
from flsl_d2.evaluation import extract_tokens
from flsl_d2.images.reader import read_rgb
from flsl_d2.modeling import FLSLViT
from flsl_d2.modeling.projection_head import FLSLHead
from flsl_d2.visualization.__main__ import (
    NamedEncoder,
    chosen_encoders,
    chosen_images,
    fitting_side,
    point,
    visualize,
)
from flsl_d2.weights import FLSLCheckpointer, build_encoder
from pretrain.methods.flsl import FLSL
from pretrain.methods.flsl_objective import FLSLLoss

TINY = {"img_size": 64, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Write a pre-training checkpoint, which has a head, and an encoder with other patches."""
    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(0)
    model = FLSL(FLSLViT(**TINY), FLSLHead(32, 16, 24, 12), FLSLLoss(16))
    FLSLCheckpointer(model, str(folder)).save("model_final")
    coarse = FLSLViT(**{**TINY, "patch_size": 16, "embed_dim": 48})
    content = {
        "model": coarse.state_dict(),
        "encoder": coarse.architecture,
        "format": "flsl_d2 encoder",
    }
    torch.save(content, folder / "coarse.pth")
    return {name: str(folder / f"{name}.pth") for name in ("model_final", "coarse")}


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for i in range(3):
        coarse = rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)
        cv2.imwrite(str(folder / f"{i}.png"), cv2.resize(coarse, (120, 90)))
    return folder


def embedded(output: Path) -> dict:
    text = (output / "index.html").read_text(encoding="utf-8")
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)
    return json.loads(found[1])


def test_two_encoders_on_real_images(weights, datasets_root, tmp_path):
    if not (datasets_root / "coco").is_dir():
        pytest.skip(f"no coco in {datasets_root}")
    ran = run_tool(
        "visualize", "--weights", f"fine={weights['model_final']}", f"coarse={weights['coarse']}",
        "--dataset", "coco_2017_val", "--max-images", "2", "--short-side", "96",
        "--iterations", "2", "--output", tmp_path,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted(
        [f"{i}_{name}_{page}.png" for i, name in ((1, "fine"), (2, "coarse"))
         for page in ("overview", "modes", "nearest_patches", "centroids")]
        + ["comparison.png", "index.html"]
    )  # fmt: skip
    for file in tmp_path.glob("*.png"):
        assert cv2.imread(str(file)).std() > 10, file.name
    assert "2 of the 50 images of coco_2017_val" in ran.stdout
    assert re.search(r"fine: \d+( to \d+)? clusters .* position R\^2 -?\d\.\d\d", ran.stdout)
    data = embedded(tmp_path)
    fine, coarse = data["encoders"]
    assert "of 16 are used" in fine["groupsNote"]
    assert "k-means" in coarse["groupsNote"]
    for encoder, name in ((fine, "model_final"), (coarse, "coarse")):
        # The tokens in the page are those of the encoder for the image of that name.
        backbone = build_encoder(weights[name])
        for image, at in zip(data["images"], encoder["images"], strict=True):
            original = read_rgb(str(datasets_root / "coco" / "val2017" / image["name"]))
            expected = extract_tokens(backbone, original, 96)
            assert (at["rows"], at["columns"]) == expected.grid
            tokens = np.frombuffer(base64.b64decode(at["tokens"]), "<f2").astype(np.float32)
            expected = expected.tokens.numpy().ravel()
            # The page's tokens are float16.
            np.testing.assert_allclose(tokens, expected, rtol=2e-3, atol=1e-4)


def test_tokens_are_chosen_in_pixels_of_the_original(weights, photos, tmp_path):
    files = [str(file) for file in sorted(photos.iterdir())[:2]]
    visualize(
        [weights["model_final"]], files, output=str(tmp_path), points=[(119, 0), (0, 89)],
        short_side=48, iterations=1,
    )  # fmt: skip
    data = embedded(tmp_path)
    assert [image["name"] for image in data["images"]] == ["0.png", "1.png"]
    for at in data["encoders"][0]["images"]:
        assert (at["rows"], at["columns"]) == (6, 8)
        assert at["check"]["token"] == 7  # the upper right one
    overview = cv2.imread(str(tmp_path / "overview.png"))
    visualize(
        [weights["model_final"]], files[:1], output=str(tmp_path / "one"), short_side=0,
        iterations=1,
    )  # fmt: skip
    assert cv2.imread(str(tmp_path / "one" / "overview.png")).shape[0] < overview.shape[0] / 2
    assert not (tmp_path / "one" / "nearest_patches.png").exists()
    assert embedded(tmp_path / "one")["encoders"][0]["positionR2"] is None
    assert embedded(tmp_path / "one")["images"][0]["width"] == 120


def test_folders_give_some_images_and_files_all(photos, capsys):
    chosen = chosen_images([str(photos), str(photos / "1.png")], "", max_images=2)
    assert [Path(file).name for file in chosen] == ["0.png", "2.png", "1.png"]
    assert "2 of the 3 images" in capsys.readouterr().out
    assert len(chosen_images([str(photos)], "", max_images=3)) == 3


def test_encoders_called_alike_get_numbers(weights):
    encoders = chosen_encoders([weights["coarse"]] * 2 + ["random"], [], "cpu")
    assert encoders[0].name.endswith("/coarse (1)")
    assert encoders[1].name.endswith("/coarse (2)")
    assert encoders[2].name == "random"
    assert encoders[2].encoder.architecture == encoders[0].encoder.architecture, "as in comparisons"
    with pytest.raises(InputError, match="'random:x' names none of the encoders; choose from b"):
        chosen_encoders([weights["coarse"], "random:x"], ["b", ""], "cpu")


def test_bad_input_is_one_sentence_and_writes_nothing(weights, photos, tmp_path):
    good = {"weights": [weights["coarse"]], "images": [str(photos)], "output": str(tmp_path / "o")}
    empty, broken = tmp_path / "empty", tmp_path / "broken.jpg"
    empty.mkdir()
    broken.write_bytes(b"no image")
    cases = [
        ({"images": []}, "no images to draw"),
        ({"images": [str(tmp_path / "none.jpg")]}, "does not exist"),
        ({"images": [str(empty)]}, "without image files"),
        ({"images": [str(broken)]}, r"broken.jpg' cannot be"),
        ({"images": [], "dataset": "nothing_val"}, "nothing_val"),
        ({"points": [(120, 5)]}, r"--token 120,5 lies outside .*0.png', which is 120 x 90 pixels"),
        ({"points": [(float("nan"), 5)]}, "lies outside"),
        ({"weights": [str(tmp_path / "none.pth")]}, "do not exist"),
        ({"weights": [str(broken)]}, "broken.jpg"),
        ({"names": ["a", "b"]}, "2 names for 1 weights"),
        ({"scale": 0.0}, "--scale is 0"),
        ({"scale": float("nan")}, "--scale is nan"),
        ({"iterations": 0}, "--iterations is 0"),
        ({"device": "tpu0"}, "device 'tpu0'"),
        ({"output": str(broken / "x")}, "cannot be written"),
    ]
    for change, message in cases:
        with pytest.raises(InputError, match=message):
            visualize(**{**good, **change})
        assert not (tmp_path / "o").exists(), change


def test_the_command_line_reads_points_and_names_errors(photos):
    assert point("12,4.5") == (12.0, 4.5)
    for text in ("12;4", "12", "1,2,3", "a,b", ""):
        with pytest.raises(argparse.ArgumentTypeError, match=re.escape(f"{text!r} is not X,Y")):
            point(text)
    ran = run_tool("visualize", "--weights", "none.pth", "--images", str(photos))
    assert ran.returncode == 2
    assert ran.stderr.strip().splitlines()[-1].startswith("error: weights 'none.pth'")


@pytest.mark.parametrize(
    ("encoding", "pairs", "count", "side"),
    [
        (0.001, 0.0001, 8, 448),  # 8 x (0.001 x 4^2.5 + 0.0001 x 4^4) = 0.5 s
        (0.1, 0.01, 8, 384),  # 46 s at 448 pixels, 29 s at 384
        (1.0, 0.1, 8, 160),  # 48 s at 192 pixels, 23 s at 160
        (9.0, 1.0, 8, 128),  # too long for every size: the smallest
    ],
)
def test_the_size_that_takes_a_minute(monkeypatch, encoding, pairs, count, side):
    """The time of a small image is known, and that of larger ones follows from it."""
    clock = [0.0]

    def taking(seconds: float):
        def run(*_: object) -> None:
            clock[0] += seconds

        return run

    for name, seconds in (("extract_tokens", encoding), ("describe_encoder", pairs)):
        monkeypatch.setattr(f"flsl_d2.visualization.__main__.{name}", taking(seconds))
    monkeypatch.setattr("flsl_d2.visualization.__main__.time.monotonic", lambda: clock[0])
    encoder = NamedEncoder("a", FLSLViT(**TINY), None)
    assert fitting_side([encoder], np.zeros((90, 120, 3), np.uint8), count, (1.0,)) == side
