"""Finding, reading and dealing out images."""

from __future__ import annotations

import itertools

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flsl_d2.errors import InputError, TrainingError
from flsl_d2.images.listing import find_images, image_files
from flsl_d2.images.reader import read_rgb
from flsl_d2.images.store import ImageStore
from pretrain.data import (
    ImageStream,
    PretrainDataset,
    build_pretrain_loader,
    check_failed_share,
    epoch_order,
)
from pretrain.views import NestedViews

SMALL_VIEWS = {"patch_size": 8, "global_size": 32, "local_size": 16}


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    for i in range(7):
        target = tmp_path / ("ab"[i % 2]) / f"{i}.{'png' if i % 3 else 'JPEG'}"
        target.parent.mkdir(exist_ok=True)
        cv2.imwrite(str(target), rng.integers(0, 256, (40, 50, 3), dtype=np.uint8))
    (tmp_path / "notes.txt").write_text("no image")
    return tmp_path


def test_any_tree_of_images(folder):
    files = find_images(folder)
    assert len(files) == 7
    assert files == sorted(files)


def test_no_images_is_said(tmp_path):
    with pytest.raises(InputError, match="holds no image"):
        find_images(tmp_path)
    with pytest.raises(InputError, match="not a folder"):
        find_images(tmp_path / "missing")


def test_unknown_data_set_is_named():
    with pytest.raises(InputError, match="coco_2017_trian"):
        image_files(name="coco_2017_trian")


def test_registered_data_set(datasets_root):
    files = image_files(root="not used", name="coco_2017_train")
    assert len(files) == 50
    assert read_rgb(files[0]).shape[2] == 3


@settings(deadline=None, max_examples=50)
@given(
    st.integers(1, 40),
    st.sampled_from([1, 2, 4]),
    st.integers(1, 4),
    st.integers(0, 9),
    st.integers(0, 99),
)
def test_stream_is_the_same_for_any_number_of_ranks_and_start(images, world, per_rank, start, seed):
    total = world * per_rank
    whole = list(itertools.islice(ImageStream(images, total, seed), 15))
    for position in range(start, 15):
        parts = []
        for rank in range(world):
            stream = ImageStream(images, total, seed, rank, world, start_iter=start)
            parts += next(itertools.islice(stream, position - start, None))
        assert parts == whole[position]
    flat = [index for batch in whole for index in batch]
    for epoch in range(len(flat) // images):
        members = [index for e, index in flat if e == epoch]
        assert sorted(members) == list(range(images))


def test_the_order_of_a_small_set_is_numpys():
    """Runs of earlier versions resume in the same order."""
    expected = np.random.default_rng([3, 5]).permutation(1000)
    assert np.array_equal(epoch_order(1000, 3, 5), expected)


def test_batch_that_ranks_do_not_divide():
    with pytest.raises(InputError, match="which 3 processes"):
        ImageStream(10, 8, world_size=3)


def test_workers_do_not_change_what_is_seen(folder):
    dataset = PretrainDataset(find_images(folder), NestedViews(**SMALL_VIEWS), seed=3)
    batches = []
    for workers in (0, 2):
        loader = iter(build_pretrain_loader(dataset, 4, workers, start_iter=2))
        batches.append([next(loader) for _ in range(4)])
        del loader
    for a, b in zip(*batches, strict=True):
        for x, y in zip(a.views + a.queries, b.views + b.queries, strict=True):
            assert torch.equal(x, y)


def test_unreadable_images_are_replaced_and_named(folder):
    broken = folder / "a" / "broken.jpg"
    broken.write_bytes(b"\xff\xd8\xff not an image")
    (folder / "a" / "empty.png").write_bytes(b"")
    files = find_images(folder)
    dataset = PretrainDataset(files, NestedViews(**SMALL_VIEWS))
    views, failed = dataset[0, files.index(str(broken))]
    assert failed[0].split("\t")[0] == str(broken)
    assert len(views.views) == 4
    with pytest.raises(InputError, match=r"broken\.jpg"):
        PretrainDataset(files, NestedViews(**SMALL_VIEWS), on_error="raise")[
            0, files.index(str(broken))
        ]


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_of_the_data_set_reaches_the_trainer_as_it_is(tmp_path, workers):
    """Without the traceback that PyTorch puts before the sentence of a worker."""
    (tmp_path / "broken.jpg").write_bytes(b"not an image")
    dataset = PretrainDataset(find_images(tmp_path), NestedViews(**SMALL_VIEWS), on_error="raise")
    with pytest.raises(InputError) as caught:
        next(iter(build_pretrain_loader(dataset, 1, workers)))
    assert str(caught.value).startswith("image '")
    assert "\n" not in str(caught.value)


def test_only_unreadable_images_stop(tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"no")
    dataset = PretrainDataset(find_images(tmp_path), NestedViews(**SMALL_VIEWS))
    with pytest.raises(InputError, match="in a row"):
        dataset[0, 0]


def test_a_share_of_bad_files_above_the_limit_stops():
    arguments = {"num_images": 50_000, "limit": 0.1, "log_file": "out/unreadable_images.txt"}
    check_failed_share(100, 900, **arguments)  # the limit itself is allowed
    check_failed_share(500, 499, **arguments)  # too few to judge
    check_failed_share(0, 0, **arguments)
    with pytest.raises(InputError) as caught:
        check_failed_share(101, 899, **arguments)
    for expected in (
        "101 of 1000 images",
        "10.1%",
        "max_failed_share=0.1",
        "out/unreadable_images",
    ):
        assert expected in str(caught.value)
    with pytest.raises(InputError, match="1 of 1000"):
        check_failed_share(1, 999, **{**arguments, "limit": 0})
    check_failed_share(999, 1, **{**arguments, "limit": 1})


def test_small_sets_are_judged_after_an_epoch():
    check_failed_share(3, 16, 20, 0.1, "log")
    with pytest.raises(InputError, match="3 of 20 images"):
        check_failed_share(3, 17, 20, 0.1, "log")


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"on_error": "ignore"}, "on_error is 'ignore'; use"),
        ({"max_pixels": 0}, "max_pixels is 0; use"),
    ],
)
def test_options_are_checked(options, expected):
    with pytest.raises(InputError, match=expected):
        PretrainDataset([], NestedViews(**SMALL_VIEWS), **options)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_batch_knows_that_the_server_is_gone_for_the_next(folder, workers):
    """So all processes stop after the same step, with a checkpoint."""

    class Away(ImageStore):
        def prefetch(self, indexes):
            if 5 in indexes:
                raise TrainingError("the server is away")

    dataset = PretrainDataset(Away(find_images(folder)), NestedViews(**SMALL_VIEWS))
    batches = iter(build_pretrain_loader(dataset, 1, workers))
    order = epoch_order(7, 0, 0).tolist()
    for place in range(order.index(5)):
        error = next(batches).next_error
        assert bool(error) == (place >= order.index(5) - 2)
    with pytest.raises(TrainingError, match=r"^the server is away$"):
        next(batches)


def test_a_cpu_run_pins_no_memory_on_a_machine_with_gpus(folder, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    dataset = PretrainDataset(find_images(folder), NestedViews(**SMALL_VIEWS))
    loaders = [
        build_pretrain_loader(dataset, 1, 2, prefetch_factor=5, device=device).loader
        for device in ("cpu", "cuda:0")
    ]
    assert [loader.pin_memory for loader in loaders] == [False, True]
    assert loaders[0].prefetch_factor == 5


def test_large_images_count_as_bad(folder):
    files = find_images(folder)
    with pytest.raises(InputError, match=r"in a row.*50 x 40 pixels are more than max_pixels"):
        PretrainDataset(files, NestedViews(**SMALL_VIEWS), max_pixels=1999)[0, 0]
    assert PretrainDataset(files, NestedViews(**SMALL_VIEWS), max_pixels=2000)[0, 0][1] == []


def test_exif_orientation_is_applied(tmp_path):
    from PIL import Image

    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    Image.new("RGB", (40, 20)).save(tmp_path / "turned.jpg", exif=exif)
    assert read_rgb(str(tmp_path / "turned.jpg")).shape == (40, 20, 3)
