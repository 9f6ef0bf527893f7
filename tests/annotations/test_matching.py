"""File names that an annotation file and the disk spell differently."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path
from urllib.parse import quote

import pytest

from flsl_d2.annotations import Use, check_coco_files
from flsl_d2.annotations.matching import find_files
from flsl_d2.annotations.records import load_coco, read_picture_files
from flsl_d2.errors import InputError


def touch(root: Path, *names: str) -> str:
    for name in names:
        path = root / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return str(root / "photos")


NFD = unicodedata.normalize("NFD", "café.png")
SAME = {
    "exact": ("sub/a.png", "sub/a.png"),
    "dots": ("..a/..x.png", "..a/..x.png"),
    "dots and backslashes": ("..a/..x.png", "..a\\..x.png"),
    "backslashes": ("sub/a.png", "sub\\a.png"),
    "folder repeated": ("sub/a.png", "photos/sub/a.png"),
    "folder repeated with backslashes": ("sub/a.png", "Photos\\sub\\a.png"),
    "letter case": ("Sub/A.PNG", "sub/a.png"),
    "quoted": ("my photo/ä&.png", quote("my photo/ä&.png")),
    "decomposed": (NFD, "café.png"),
    "composed": ("café.png", NFD),
    "backslash in the name": ("a\\b.png", "a\\b.png"),
    "per cent in the name": ("100%20.png", "100%20.png"),
    "several at once": ("Sub/" + NFD, "photos\\sub\\caf%C3%A9.PNG"),
    "another machine": ("sub/a.png", "/home/me/sub/a.png"),
    "Windows": ("sub/a.png", "C:\\data\\sub\\a.png"),
    "parents": ("a.png", "..\\..\\label-studio\\upload\\1\\a.png"),
    "hidden parents": ("a.png", "x/%2e%2e/a.png"),
    "URL": ("a.png", "https://example.com/1/a.png"),
    "foreign folder": ("a.png", "train2017/a.png"),
    "folder left out": ("train/sub/a.png", "sub/a.png"),
    "other format": ("sub/a.jpg", "sub/a.png"),
}


@pytest.mark.parametrize("case", SAME)
def test_a_file_is_found_under_another_spelling(case: str, tmp_path: Path) -> None:
    on_disk, written = SAME[case]
    root = touch(tmp_path, on_disk, "another/b.png")
    assert find_files([written], root) == ({written: on_disk}, {})


def test_links_that_the_user_made_are_followed(tmp_path: Path) -> None:
    root = touch(tmp_path / "elsewhere", "a.png")
    (tmp_path / "linked").symlink_to(root)
    (Path(root) / "back").symlink_to(tmp_path)
    assert find_files(["linked/a.png"], str(tmp_path)) == ({"linked/a.png": "linked/a.png"}, {})
    assert find_files(["x\\A.png"], root) == ({"x\\A.png": "a.png"}, {})


def test_no_file_is_found_twice_or_by_guessing(tmp_path: Path) -> None:
    root = touch(
        tmp_path, "a.png", "b.png", "B.PNG", "img_1.png", "cam1/c.png", "x/d.png", "y/d.png"
    )
    names = ["A.png", "a.png", "b.Png", "img_2.png", "cam2/c.png", "d.png", "/etc/passwd"]
    meant = {"A.png": "a.png", "b.Png": "B.PNG", "cam2/c.png": "cam1/c.png", "d.png": "x/d.png"}
    del meant["A.png"]  # taken
    assert find_files(names, root) == ({"a.png": "a.png"}, meant)
    assert find_files(["../photos/img_1.png"], root)[0] == {"../photos/img_1.png": "img_1.png"}


def test_the_picture_in_the_right_folder_is_found(tmp_path: Path) -> None:
    root = touch(tmp_path, "images/a.png", "labels/a.png", "x/1.png", "y/1.png")
    names = ["images\\a.png", "z\\x\\1.png", "z\\y\\1.png"]
    files = ["images/a.png", "x/1.png", "y/1.png"]
    assert find_files(names, root) == (dict(zip(names, files, strict=True)), {})


def dataset(root: Path, names: list[str]) -> Path:
    images = [{"id": i, "file_name": name, "height": 8, "width": 8} for i, name in enumerate(names)]
    annotations = [
        {"id": i + 1, "image_id": i, "category_id": 1, "bbox": [1, 1, 3, 3]} for i in range(3)
    ]
    content = {
        "images": images, "annotations": annotations, "categories": [{"id": 1, "name": "x"}]
    }  # fmt: skip
    (root / "a.json").write_text(json.dumps(content))
    return root / "a.json"


def test_every_reader_finds_the_same_files(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    on_disk = [f"sub/{i}.png" for i in range(3)]
    root = touch(tmp_path, *on_disk)
    json_file = dataset(tmp_path, [name.replace("/", "\\") for name in on_disk])
    check_coco_files(json_file, root)
    assert "3 of 3 file names are spelled in another way" in caplog.text
    assert "sub\\0.png as sub/0.png" in caplog.text
    expected = [f"{root}/{name}" for name in on_disk]
    assert [r["file_name"] for r in load_coco(str(json_file), root)] == expected
    assert read_picture_files(str(json_file), root) == expected


@pytest.mark.parametrize("use", [Use.PICTURES, Use.BOXES])
def test_missing_files_are_named_with_what_may_be_meant(use: Use, tmp_path: Path) -> None:
    root = touch(tmp_path, "0.png", "cam1/1.png")
    json_file = dataset(tmp_path, ["0.png", "cam2/1.png", "../../2.png"])
    message = r"2 of 3 images are missing in .*: cam2/1.png \(did you mean cam1/1.png\?\), \.\./"
    with pytest.raises(InputError, match=message):
        check_coco_files(json_file, root, use)
