"""Presets: the rules at the sizes that the guide names, and runs of images alone."""

from __future__ import annotations

import logging
from pathlib import Path

import cv2
import numpy as np
import pytest
from detectron2.config import instantiate
from hypothesis import given
from hypothesis import strategies as st

from flsl_d2.engine.config_files import load_lazy_config
from flsl_d2.engine.run_folder import flat_config
from pretrain import presets
from pretrain.__main__ import main
from pretrain.presets import FIXED_GIB, MIB_PER_IMAGE, choose_preset
from pretrain.schedules import set_run_length
from pretrain.summary import try_images

GUIDE = Path(__file__).parents[2] / "docs" / "GETTING_STARTED.md"
IMAGES = {"1,000": 1_000, "10,000": 10_000, "100,000": 100_000, "1,000,000": 1_000_000}
MEMORY = {"CPU": 0, "12 GB": 12, "24 GB": 24, "48 GB": 48, "80 GB": 80}
SHORT = [
    *("train.max_iter=2", "train.log_period=1", "dataloader.total_batch_size=2"),
    *("model.backbone.depth=1", "views.global_size=32", "views.local_size=16"),
    "train.device=cpu",
]


def changes(preset) -> dict[str, str]:
    return dict(text.partition("=")[::2] for text in preset.overrides)


def test_the_table_of_the_guide_is_what_the_rules_give():
    for name, count in IMAGES.items():
        cells = []
        for memory in MEMORY.values():
            preset = choose_preset(count, memory)
            keys = changes(preset)
            batch, epochs = int(keys["dataloader.total_batch_size"]), int(keys["train.epochs"])
            encoder = preset.encoder if memory else "small"
            cells.append(f"{encoder}, {batch}, {epochs}")
        assert f"| {name} | {' | '.join(cells)} |" in GUIDE.read_text()


@pytest.mark.parametrize("count", IMAGES.values())
@pytest.mark.parametrize("memory", MEMORY.values())
def test_a_preset_is_a_recipe_with_a_sensible_course(count, memory):
    preset = choose_preset(count, memory)
    cfg = load_lazy_config(preset.config, preset.overrides)  # refuses keys that a recipe lacks
    steps = set_run_length(cfg, count)
    schedules = instantiate(cfg.schedules)
    assert schedules.warmup_iters == round(steps / (10 if memory else 25))
    assert 2_000 <= steps <= 260_000
    assert schedules.temp_iters <= steps or len(set(schedules.teacher_temp)) == 1
    assert schedules.frozen_iters <= 0.05 * steps
    assert max(schedules(i).lr for i in range(0, steps, steps // 50)) <= schedules.peak_lr
    assert 3e-4 < schedules.peak_lr <= 1e-3
    assert cfg.model.loss.num_centroids <= max(8 * cfg.dataloader.total_batch_size, 256)


@given(
    st.integers(1, 3_000_000),
    st.sampled_from([0, 6, 8, 11, 16, 40, 141]),
    st.sampled_from([1, 2, 3, 8]),
)
def test_batches_fit_the_card_and_the_processes(count, memory, processes):
    preset = choose_preset(count, memory, processes if memory else 1)
    keys = changes(preset)
    batch, epochs = int(keys["dataloader.total_batch_size"]), int(keys["train.epochs"])
    assert epochs * count >= batch * (2_000 if not memory else 10_000) or epochs * count >= count
    if memory:
        assert batch % processes == 0
        size = preset.config.split("_")[2]
        each = batch / processes
        assert each == 1 or FIXED_GIB[size] + each * MIB_PER_IMAGE[size] / 1024 <= memory


def test_more_memory_and_more_images_never_shrink_a_step():
    for size in (1_000, 10_000, 100_000):
        batches = [int(changes(choose_preset(size, m))["dataloader.total_batch_size"])
                   for m in (6, 12, 24, 48, 80)]  # fmt: skip
        assert batches == sorted(batches)


@pytest.fixture
def photos(tmp_path) -> Path:
    folder = tmp_path / "my photos, 2024"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(4):
        cv2.imwrite(str(folder / f"{i}.jpg"), rng.integers(0, 256, (48, 48, 3), dtype=np.uint8))
    (folder / "._0.jpg").write_bytes(b"a resource fork")
    return folder


@pytest.mark.parametrize("kind", ["folder", "pattern", "list"])
def test_images_alone_are_enough(kind, photos, tmp_path, run_main):
    listed = tmp_path / "list.txt"
    listed.write_text("# four\n\n" + "".join(f"{photos.name}/{i}.jpg\n" for i in range(4)))
    source = {"folder": photos, "pattern": photos / "*.jpg", "list": listed}[kind]
    output = tmp_path / "run"
    arguments = ["--images", str(source), f"train.output_dir={output}", *SHORT]
    status, printed, error = run_main(main, *arguments)
    assert status == 0, error
    assert "so the preset is configs/pretrain/flsl_vit_mini_p8_small_data.py" in printed
    assert (output / "teacher_backbone.pth").is_file()
    log = (output / "log.txt").read_text()
    assert "4 images; 0 of 4 that were tried cannot be read" in log
    assert ("1 image files that are hidden" in log) == (kind == "folder")
    assert "step: 2 images (1 process(es), 2 each)" in log
    if kind != "folder":
        return
    # The file that the run leaves is the same config, and resuming needs no choice.
    kept = load_lazy_config(str(output / "preset.py"))
    set_run_length(kept, 4)
    before = flat_config(load_lazy_config(str(output / "preset.py"), ["train.seed=0"]))
    assert before["model.partner"] == "place"
    assert before["dataset.root"] == str(photos)
    assert before["train.max_iter"] == "2"
    status, printed, error = run_main(main, *arguments[:3], "--resume")
    assert status == 0, error
    assert "so the preset is" not in printed
    status, _, error = run_main(main, *arguments)
    assert status == 2
    assert "--resume" in error


def test_a_recipe_takes_the_images(photos, tmp_path, run_main):
    arguments = ["--config-file", presets.CPU_CONFIG, "--images", str(photos)]
    status, printed, _ = run_main(main, *arguments, f"train.output_dir={tmp_path / 'run'}", *SHORT)
    assert status == 0
    assert "so the preset is" not in printed
    assert not (tmp_path / "run" / "preset.py").exists()


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("/nowhere", "matches no file"),
        ("{folder}", "holds no image file"),
        ("{folder}/text.txt", "no list of image files (line 'hello' names no image file)"),
        ("{folder}/empty.txt", "it is empty"),
        ("{folder}/lost.txt", "none of 2 images that were tried can be read"),
    ],
)
def test_images_that_cannot_be_found_are_one_sentence(source, words, tmp_path, run_main):
    (tmp_path / "text.txt").write_text("hello\n")
    (tmp_path / "empty.txt").write_text("\n# nothing\n")
    (tmp_path / "lost.txt").write_text("a.jpg\nb.jpg\n")
    output = f"train.output_dir={tmp_path / 'run'}"
    status, _, error = run_main(main, "--images", source.format(folder=tmp_path), output, *SHORT)
    assert status == 2
    (line,) = [line for line in error.splitlines() if line.startswith("error: ")]
    assert words in line
    assert "Traceback" not in error


def test_without_images_and_recipe_the_tool_says_what_it_needs(run_main):
    status, _, error = run_main(main)
    assert status == 2
    assert error == "error: give --images SOURCE, or a recipe by --config-file FILE; --help lists" \
        " the options.\n"  # fmt: skip


def test_headers_of_some_images_are_tried(photos, caplog):
    (photos / "5.jpg").write_bytes(b"nothing")
    files = sorted(map(str, photos.glob("[0-9].jpg")))
    with caplog.at_level(logging.WARNING):
        assert try_images(files).startswith("1 of 5 that were tried cannot be read, such as '")
    assert try_images(files, 2).startswith("1 of 2")
