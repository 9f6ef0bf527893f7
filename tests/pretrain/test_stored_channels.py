"""Pre-training on stored values: 4 channels of 16 bits, from a folder to an encoder."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from flsl_d2.errors import InputError
from flsl_d2.images.stored_values import channel_statistics, find_channels
from flsl_d2.weights import build_encoder
from pretrain.__main__ import main
from pretrain.augmentation import Augmentation, apply_augmentation
from pretrain.data import PretrainDataset
from pretrain.views import NestedViews

tifffile = pytest.importorskip("tifffile")
SHORT = [
    *("train.max_iter=2", "train.log_period=1", "dataloader.total_batch_size=2"),
    *("model.backbone.depth=1", "views.global_size=32", "views.local_size=16"),
    "train.device=cpu",
]


def write(path: Path, seed: int, channels: int = 4) -> None:
    pixels = np.random.default_rng(seed).integers(0, 60_000, (40, 48, channels)).astype(np.uint16)
    tifffile.imwrite(path, pixels, photometric="minisblack", planarconfig="contig")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "images"
    root.mkdir()
    for seed in range(3):
        write(root / f"{seed}.tif", seed)
    return root


def test_a_folder_is_pretrained_without_a_config_and_its_encoder_loads(folder, tmp_path, run_main):
    output = tmp_path / "out"
    status, out, err = run_main(main, "--images", str(folder), *SHORT, f"train.output_dir={output}")
    assert status == 0, err
    assert "dataset.channels=4  " in out
    assert "the images hold more than RGB of 8 bits" in out
    assert "Saturation, hue, greyscale and solarisation" in out
    encoder = build_encoder(str(output / "teacher_backbone.pth"))
    assert encoder.architecture["in_chans"] == 4
    # Mean and deviation are those of the files, and are kept with the config.
    values = np.concatenate([tifffile.imread(f).reshape(-1, 4) for f in folder.iterdir()])
    mean, std = channel_statistics([str(file) for file in folder.iterdir()], 4)
    np.testing.assert_allclose(mean, values.mean(axis=0), rtol=1e-5)
    np.testing.assert_allclose(std, values.std(axis=0), rtol=1e-5)
    stated = encoder.input_format
    assert (stated.channels, stated.bits, stated.stated) == (4, 16, True)
    assert (list(stated.mean), list(stated.std)) == (mean, std)
    assert f"pixel_mean: [{mean[0]}" in (output / "config.yaml").read_text().replace(
        "\n  - ", ", "
    ).replace("pixel_mean:, ", "pixel_mean: [")
    # The run is complete, and another start has the same settings.
    status, _, err = run_main(
        main, "--images", str(folder), "--resume", *SHORT, f"train.output_dir={output}"
    )
    assert status == 0, err


def test_views_hold_the_stored_values(folder):
    views = NestedViews(patch_size=8, global_size=40, local_size=16, photometry=0.0)
    dataset = PretrainDataset([str(folder / "0.tif")], views, channels=4)
    images = dataset[(0, 0)][0].views
    assert all(image.dtype == torch.float32 and image.shape[0] == 4 for image in images)
    # Blur and resampling keep the mean of noise, whose standard error here is below 3%.
    means = images[0].mean(dim=(1, 2)).numpy()
    np.testing.assert_allclose(means, tifffile.imread(folder / "0.tif").mean(axis=(0, 1)), rtol=0.1)
    assert float(images[0].max()) > 10_000


@pytest.mark.parametrize("channels", [1, 4, 6])
def test_stored_values_are_augmented_as_the_definition_says(channels):
    image = np.random.default_rng(0).random((8, 8, channels)).astype(np.float32) * 5000
    drawn = Augmentation((2, 0, 3, 1), (1.2, 0.7, 1.1, 0.05), True, 0.0, True)
    bright = image * 1.2
    wanted = (bright - bright.mean(axis=(0, 1))) * 0.7 + bright.mean(axis=(0, 1))
    np.testing.assert_allclose(apply_augmentation(image, drawn), wanted, rtol=1e-4, atol=1e-2)
    blurred = apply_augmentation(image, Augmentation((), (1, 1, 1, 0), False, 1.0, False))
    assert blurred.shape == image.shape
    assert blurred.std() < 0.6 * image.std()


def test_which_images_hold_more_than_rgb(folder, tmp_path):
    files = sorted(map(str, folder.iterdir()))
    (tmp_path / "broken.tif").write_bytes(b"II*\0")
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    Image.fromarray(np.zeros((8, 8), np.uint16)).save(tmp_path / "grey.png")
    assert find_channels([*files, str(tmp_path / "broken.tif")]) == (4, 16)
    assert find_channels([str(tmp_path / "a.png")]) == (0, 8)
    assert find_channels([str(tmp_path / "grey.png")]) == (1, 16)
    # One picture of 16 bits among photographs is read as one.
    assert find_channels([str(tmp_path / "a.png"), str(tmp_path / "grey.png")]) == (0, 8)
    with pytest.raises(InputError, match="have 3 and 4 channels"):
        find_channels([*files, str(tmp_path / "a.png")])
    assert find_channels([str(tmp_path / "broken.tif")]) == (0, 8)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["views.on_device=augmentation"], "set views.on_device=nothing"),
        (["dataset.pixel_mean=[1,2]"], "have 2 and 0 values; give 4 of each"),
        (["dataset.channels=3"], "4 channels instead of 3"),
        (["train.measures.val=coco_2017_val"], "leave train.measures.val empty"),
    ],
)
def test_what_needs_rgb_is_refused(folder, tmp_path, run_main, options, sentence):
    arguments = [*SHORT, f"train.output_dir={tmp_path / 'out'}", *options]
    status, _, err = run_main(main, "--images", str(folder), *arguments)
    assert status == 2
    assert sentence in err
