"""File names that an annotation file and the disk spell differently."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path
from urllib.parse import quote

import pytest

from flsl_d2.annotations import Use, check_coco_files
from flsl_d2.annotations.image_folder import FoundFile, ImageFolder, stays_inside
from flsl_d2.annotations.records import load_coco, read_picture_files
from flsl_d2.errors import InputError


def find(root: Path, *names: str) -> list[FoundFile]:
    return ImageFolder(str(root)).find(names)


def touch(root: Path, *names: str) -> Path:
    for name in names:
        path = root / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return root / "images"


NFD = unicodedata.normalize("NFD", "café.png")
SAME = {
    "exact": ("sub/a.png", "sub/a.png"),
    "backslashes": ("sub/a.png", "sub\\a.png"),
    "folder repeated": ("sub/a.png", "images/sub/a.png"),
    "folder repeated with backslashes": ("sub/a.png", "Images\\sub\\a.png"),
    "letter case": ("Sub/A.PNG", "sub/a.png"),
    "quoted": ("my photo/ä&.png", quote("my photo/ä&.png")),
    "decomposed": (NFD, "café.png"),
    "composed": ("café.png", NFD),
    "backslash in the name": ("a\\b.png", "a\\b.png"),
    "per cent in the name": ("100%20.png", "100%20.png"),
    "several at once": ("Sub/" + NFD, "images\\sub\\caf%C3%A9.PNG"),
}


@pytest.mark.parametrize("case", SAME)
def test_a_file_is_found_under_another_spelling(case: str, tmp_path: Path) -> None:
    on_disk, written = SAME[case]
    assert find(touch(tmp_path, on_disk), written) == [FoundFile(on_disk)]


def test_the_whole_path_of_the_folder_is_taken_off(tmp_path: Path) -> None:
    root = touch(tmp_path, "sub/a.png")
    assert find(root, f"{root}/sub/a.png") == [FoundFile("sub/a.png")]


MEANT = {
    "absolute": ("sub/a.png", "/home/me/sub/a.png"),
    "Windows": ("sub/a.png", "C:\\data\\sub\\a.png"),
    "parents": ("a.png", "..\\..\\label-studio\\upload\\1\\a.png"),
    "hidden parents": ("a.png", "x/%2e%2e/a.png"),
    "URL": ("a.png", "https://example.com/1/a.png"),
    "foreign folder": ("a.png", "train2017/a.png"),
    "other format": ("sub/a.jpg", "sub/a.png"),
}


@pytest.mark.parametrize("case", MEANT)
def test_a_file_that_may_be_meant_is_named(case: str, tmp_path: Path) -> None:
    on_disk, written = MEANT[case]
    assert find(touch(tmp_path, on_disk), written) == [FoundFile(None, on_disk)]


def test_no_file_is_found_twice_or_by_guessing(tmp_path: Path) -> None:
    root = touch(tmp_path, "a.png", "b.png", "B.PNG", "img_1.png")
    assert find(root, "A.png", "a.png") == [FoundFile(None, "a.png"), FoundFile("a.png")]
    assert find(root, "b.Png", "img_2.png", "") == [
        FoundFile(None, "B.PNG"), FoundFile(None), FoundFile(None)
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["a", "..a/b", "a..", "a/...", "C:", "c/:x"])
def test_harmless_names_stay_inside(name: str) -> None:
    assert stays_inside(name)


@pytest.mark.parametrize(
    "name", ["/a", "..", "a/../b", "a\\..\\b", "..\\b", "%2e%2e/b", "a/%2E./b", "C:\\a", "c:/a"]
)
def test_names_that_could_lead_out(name: str) -> None:
    assert not stays_inside(name)


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
    expected = [str(root / name) for name in on_disk]
    assert [r["file_name"] for r in load_coco(str(json_file), str(root))] == expected
    assert read_picture_files(str(json_file), str(root)) == expected


@pytest.mark.parametrize("use", [Use.PICTURES, Use.BOXES])
def test_missing_files_are_named_with_what_may_be_meant(use: Use, tmp_path: Path) -> None:
    root = touch(tmp_path, "0.png", "1.png", "2.png")
    json_file = dataset(tmp_path, ["0.png", "/data/1.png", "x\\..\\2.png"])
    with pytest.raises(InputError) as caught:
        check_coco_files(json_file, root, use)
    _, absolute, parent = str(caught.value).splitlines()
    assert "absolute" in absolute
    assert absolute.endswith("/data/1.png (did you mean 1.png?)")
    assert "leaves the image folder" in parent
    assert parent.endswith("x\\..\\2.png (did you mean 2.png?)")
