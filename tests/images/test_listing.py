"""Which files of a folder are images."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from PIL import Image

from flsl_d2.errors import InputError
from flsl_d2.images import listing
from flsl_d2.images.listing import find_images

HIDDEN = [
    "__MACOSX/photos/._a.jpg",
    ".ipynb_checkpoints/a-checkpoint.png",
    ".Trash-1000/files/a.jpg",
    "$RECYCLE.BIN/a.jpg",
    "photos/@eaDir/a.jpg/SYNOPHOTO_THUMB_M.jpg",
    "photos/._b.jpg",
    "photos/.hidden.png",
]


def touch(root: Path, names: list[str]) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


def test_hidden_files_are_left_out_and_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shown = ["photos/a.jpg", "photos/b.JPG", "trash/c.png", "a.b/d.gif"]
    touch(tmp_path, [*shown, *HIDDEN, "photos/Thumbs.db", "photos/.DS_Store", "a.txt"])
    with caplog.at_level(logging.WARNING):
        assert find_images(tmp_path) == sorted(str(tmp_path / name) for name in shown)
    (message,) = (record.getMessage() for record in caplog.records)
    assert f"{len(HIDDEN)} image files that are hidden" in message
    assert str(tmp_path / HIDDEN[3]) in message


def test_a_folder_of_nothing_else_says_so(tmp_path: Path) -> None:
    touch(tmp_path, HIDDEN[:1])
    with pytest.raises(InputError, match=r"holds no image file.*1 image files that are hidden"):
        find_images(tmp_path)


def test_files_that_hold_no_image_are_counted_by_kind(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    touch(tmp_path, ["a.HEIC", "b.avif", *(f"{i}.txt" for i in range(9)), "README"])
    (tmp_path / "list").mkdir()
    with pytest.raises(InputError, match=r"12 files that hold no image \(9 \.txt, .*convert"):
        find_images(tmp_path)
    touch(tmp_path, ["d.jfif", "e.JPE", "f.webp"])
    assert [Path(path).name for path in find_images(tmp_path)] == ["d.jfif", "e.JPE", "f.webp"]
    assert "3 images; left out: 12 files that hold no image (9 .txt, " in caplog.text


def test_content_decides_and_not_the_name(tmp_path: Path) -> None:
    shown = ["a.png_large", "b.png?width=640", "0123456789abcdef", "c.heic", "d.txt", "e.jpg"]
    for name in shown:
        Image.new("RGB", (4, 4)).save(tmp_path / name, "PNG")
    touch(tmp_path, ["f.png_large", "no image"])
    assert find_images(tmp_path) == sorted(str(tmp_path / name) for name in shown)
    assert find_images(tmp_path / "d.txt") == [str(tmp_path / "d.txt")]
    (tmp_path / "list").write_text("c.heic\nd.txt\n")
    assert find_images(tmp_path / "list") == [str(tmp_path / name) for name in ("c.heic", "d.txt")]


def test_files_of_a_kind_without_images_are_not_all_opened(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(listing, "_OPENED_OF_A_SUFFIX", 3)
    opened = []
    monkeypatch.setattr(listing, "holds_image", lambda path: opened.append(path) or False)
    touch(tmp_path, ["a.jpg", *(f"{i}.json" for i in range(9))])
    assert len(listing.search_images(tmp_path).unread) == 9
    assert len(opened) == 3


def test_the_folder_itself_may_be_hidden(tmp_path: Path) -> None:
    touch(tmp_path, [".cache/__MACOSX/a.jpg"])
    assert len(find_images(tmp_path / ".cache/__MACOSX")) == 1


def test_a_folder_that_a_hidden_one_links_to_is_shown(tmp_path: Path) -> None:
    touch(tmp_path, ["photos/a.jpg"])
    (tmp_path / ".link").symlink_to(tmp_path / "photos")
    assert find_images(tmp_path) == [str(tmp_path / "photos/a.jpg")]


def test_plain_folders_log_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    touch(tmp_path, ["a.jpg"])
    find_images(tmp_path)
    assert caplog.records == []
