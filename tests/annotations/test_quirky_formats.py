"""Generated YOLO, VOC, LabelMe and CVAT data with faults: each object is used rightly or accounted.

``QUIRKY_FORMATS=1000 pytest tests/annotations/test_quirky_formats.py`` draws that many data sets a
format anew.
"""

from __future__ import annotations

import codecs
import json
import math
import os
import tempfile
import unicodedata
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from xml.sax.saxutils import quoteattr

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from flsl_d2.annotations import convert
from flsl_d2.annotations.convert import convert_to_coco, recognise_annotations
from flsl_d2.annotations.findings import Findings
from flsl_d2.errors import InputError
from tests.hostile import HOSTILE

DRAWS = int(os.environ.get("QUIRKY_FORMATS", 0))
WIDTH, HEIGHT = 64, 48
LABELS = ["person", "car", "Möwe", *(h for h in HOSTILE if h.isprintable() and h.strip() == h)]
# Faults of an object, of a file of annotations, and of a picture.
OBJECT_FAULTS = ["plain"] * 6 + [
    *("twice", "turned", "polygon", "over the border", "outside", "no area", "swapped"),
    *("word", "cut line", "nan", "huge", "no label", "other shape", "marked", "attribute"),
]
FILE_FAULTS = ["plain"] * 6 + [
    *("mark", "crlf", "upper case", "cut off", "empty", "stale", "backslashes", "no name"),
    *("another encoding", "other content"),
]
PICTURE_FAULTS = ["plain"] * 8 + [*("missing", "other suffix", "other form", "second suffix")]
NAMES = ["a", "b c", "d.e", "Möwe", "1", "A", "cam_$i_$3"]


@dataclass
class Drawn:
    """An object: its label, its number in its picture, and its fault."""

    label: str
    number: int
    fault: str

    @property
    def box(self) -> tuple[int, int, int, int]:
        """Corners, another box for every number."""
        x, y, w, h = 4 + self.number, 6 + self.number, 16, 8
        moved = {"over the border": WIDTH - 8 - x, "outside": WIDTH}.get(self.fault, 0)
        w = 0 if self.fault == "no area" else w
        return x + moved, y, x + moved + w, y + h


@dataclass
class Entry:
    """A picture with its objects and faults."""

    name: str
    folder: str
    file_fault: str
    picture_fault: str
    objects: list[Drawn] = field(default_factory=list)


@st.composite
def data_sets(draw: st.DrawFn) -> list[Entry]:
    names = st.tuples(st.sampled_from(["", "cam1", "cam2", "cam1/day"]), st.sampled_from(NAMES))
    entries = []
    for folder, name in draw(st.lists(names, min_size=1, max_size=5, unique=True)):
        entry = Entry(
            name, folder, draw(st.sampled_from(FILE_FAULTS)), draw(st.sampled_from(PICTURE_FAULTS))
        )
        for number in range(draw(st.integers(0, 4))):
            label = draw(st.sampled_from(LABELS))
            entry.objects.append(Drawn(label, number, draw(st.sampled_from(OBJECT_FAULTS))))
        entries.append(entry)
    return entries


def expected(entry: Entry, each: Drawn, kind: str) -> tuple[float, ...] | None:
    """Box x, y, width, height that an object must have if it is used; None if it must be told."""
    x0, y0, x1, y1 = each.box
    if each.fault in ("outside", "no area", "word", "cut line", "nan", "huge", "no label"):
        return None
    if each.fault == "other shape" and kind != "YOLO":
        return None
    if each.fault == "turned" and kind in ("Pascal VOC", "CVAT"):
        x, y = (x0 + x1) / 2, (y0 + y1) / 2
        return x - (y1 - y0) / 2, y - (x1 - x0) / 2, y1 - y0, x1 - x0
    x1 = min(x1, WIDTH)
    return x0, y0, x1 - x0, y1 - y0


def written(value: object, fault: str) -> str:
    return {"word": "x", "nan": "nan", "huge": "1e999"}.get(fault, str(value))


def yolo_line(each: Drawn, names: list[str]) -> str:
    x0, y0, x1, y1 = (v / s for v, s in zip(each.box, (WIDTH, HEIGHT) * 2, strict=True))
    values: list[float] = [(x0 + x1) / 2, (y0 + y1) / 2, x1 - x0, y1 - y0]
    if each.fault in ("polygon", "turned"):
        values = [x0, y0, x1, y0, x1, y1, (x0 + x1) / 2, y1, x0, y1]
    words = [str(names.index(each.label)), *map(str, values)]
    words[1] = written(words[1], each.fault)
    if each.fault == "no label":
        words[0] = "-1"
    if each.fault == "marked":
        words.append("0.9")
    return " ".join(words[:4] if each.fault == "cut line" else words)


def voc_object(each: Drawn) -> str:
    x0, y0, x1, y1 = each.box
    if each.fault == "swapped":
        x0, x1 = x1, x0
    name = "" if each.fault == "no label" else f"<name>{_text(each.label)}</name>"
    box = f"<bndbox><xmin>{written(x0, each.fault)}</xmin><ymin>{y0}</ymin><xmax>{x1}</xmax>"
    box += "</bndbox>" if each.fault == "cut line" else f"<ymax>{y1}</ymax></bndbox>"
    if each.fault == "turned":
        box = (
            f"<robndbox><cx>{(x0 + x1) / 2}</cx><cy>{(y0 + y1) / 2}</cy><w>{x1 - x0}</w>"
            f"<h>{y1 - y0}</h><angle>{math.pi / 2}</angle></robndbox>"
        )
    if each.fault == "other shape":
        box = f"<point><x>{x0}</x></point>"
    marked = int(each.fault == "marked")
    return f"<object>{name}<difficult>{marked}</difficult>{box}</object>"


def _text(text: str) -> str:
    return quoteattr(text)[1:-1].replace("<", "&lt;")


def labelme_shape(each: Drawn) -> dict[str, Any]:
    x0, y0, x1, y1 = each.box
    points: list[Any] = [[x0, y0], [x1, y1]]
    shape: dict[str, Any] = {"label": each.label, "shape_type": "rectangle", "points": points}
    if each.fault == "polygon":
        shape.update(shape_type="polygon", points=[[x0, y0], [x1, y0], [x1, y1], [x0, y1]])
    odd = {"word": "x", "nan": math.nan, "huge": 10**400}
    if each.fault in odd:
        points[0] = [odd[each.fault], y0]
    if each.fault == "cut line":
        del points[1]
    if each.fault == "no label":
        del shape["label"]
    if each.fault == "other shape":
        shape["shape_type"] = "linestrip"
    if each.fault == "swapped":
        shape["points"] = points[::-1]
    if each.fault == "attribute":
        shape.update(group_id=3, flags={"hidden": True})
    return shape


def cvat_shape(each: Drawn) -> str:
    x0, y0, x1, y1 = each.box
    label = "" if each.fault == "no label" else f" label={quoteattr(each.label)}"
    turned = ' rotation="90.0"' if each.fault == "turned" else ""
    end = "" if each.fault == "cut line" else f' ybr="{y1}"'
    if each.fault == "polygon":
        return f'<polygon{label} points="{x0},{y0};{x1},{y0};{x1},{y1};{x0},{y1}"/>'
    if each.fault == "other shape":
        return f'<polyline{label} points="{x0},{y0};{x1},{y1}"/>'
    inner = "<attribute>red</attribute>" if each.fault == "attribute" else ""
    left = written(x0, each.fault)
    return f'<box{label} xtl="{left}" ytl="{y0}" xbr="{x1}"{end}{turned}>{inner}</box>'


def write(kind: str, root: Path, entries: list[Entry]) -> dict[int, str]:
    """Write annotations and pictures.

    Returns:
        The place of each object by its id, as an account must name it.
    """
    suffix = {"YOLO": ".txt", "Pascal VOC": ".xml", "LabelMe": ".json", "CVAT": ""}[kind]
    (root / "images").mkdir()
    (root / "labels").mkdir()
    names = sorted({each.label for entry in entries for each in entry.objects} or {"person"})
    (root / "labels" / "data.yaml").write_text(json.dumps({"names": names}))
    places: dict[int, str] = {}
    images = []
    for entry in entries:
        picture = root / "images" / entry.folder / f"{entry.name}.png"
        picture.parent.mkdir(parents=True, exist_ok=True)
        if entry.picture_fault == "other suffix":
            picture = picture.with_name(f"{entry.name}.bmp")
        if entry.picture_fault == "other form":
            picture = picture.with_name(unicodedata.normalize("NFD", picture.name))
        if entry.picture_fault != "missing":
            Image.new("RGB", (WIDTH, HEIGHT)).save(picture)
        if entry.picture_fault == "second suffix":
            Image.new("RGB", (WIDTH, HEIGHT)).save(picture.with_suffix(".bmp"))
        stated = f"{entry.name}.png"
        stated = {"stale": "other.png", "backslashes": f"C:\\data\\{stated}"}.get(
            entry.file_fault, stated
        )
        objects = [o for o in entry.objects for _ in range(1 + (o.fault == "twice"))]
        if kind == "CVAT":
            name = f"{entry.folder}/{entry.name}.png".lstrip("/")
            if entry.file_fault == "backslashes":
                name = f"C:\\data\\{name}".replace("/", "\\")
            shapes = "".join(map(cvat_shape, objects))
            size = f'width="{WIDTH}" height="{HEIGHT}"'
            images.append(f"<image id='1' name={quoteattr(name)} {size}>{shapes}</image>")
            places.update({id(o): f"image {name}" for o in objects})
            continue
        file = root / "labels" / entry.folder / f"{entry.name}{suffix}"
        if entry.file_fault == "upper case":
            file = file.with_name(f"{entry.name}{suffix.upper()}")
        places.update({id(o): str(file) for o in objects})
        stated_xml = "" if entry.file_fault == "no name" else f"<filename>{stated}</filename>"
        text = {
            ".txt": "".join(f"{yolo_line(each, names)}\n" for each in objects),
            ".xml": f"<annotation>{stated_xml}{''.join(map(voc_object, objects))}</annotation>",
            ".json": json.dumps(
                {"shapes": [labelme_shape(each) for each in objects]}
                | ({} if entry.file_fault == "no name" else {"imagePath": stated})
            ),
        }[suffix]
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(_bytes(text, entry.file_fault))
    if kind == "CVAT":
        (root / "a.xml").write_text(f"<annotations>{''.join(images)}</annotations>", "utf-8")
    return places


def _bytes(text: str, fault: str) -> bytes:
    if fault == "cut off":
        text = text[: len(text) // 2]
    elif fault == "empty":
        text = ""
    elif fault == "other content":
        text = "[1]" if text.startswith("{") else "<x/>" if text.startswith("<") else "read me"
    elif fault == "crlf":
        text = text.replace("\n", "\r\n")
    data = text.encode("utf-16" if fault == "another encoding" else "utf-8")
    return codecs.BOM_UTF8 + data if fault == "mark" else data


class Recorded(Findings):
    """Findings that remember all of what they were told."""

    examples: list[str]

    def _note(self, level: str, kind: str, example: object, count: int = 1) -> None:
        self.examples.append(f"{kind}: {example}")
        super()._note(level, kind, example, count)


def account(kind: str, entries: list[Entry], root: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    places = write(kind, root, entries)
    Recorded.examples = []
    monkeypatch.setattr(convert, "Findings", Recorded)
    try:
        source = recognise_annotations(root / ("a.xml" if kind == "CVAT" else "labels"))
        content, lines = convert_to_coco(source, root / "images")
    except InputError as error:
        text = str(error)
        assert str(root) in text
        assert text.count("\n") == text.count("\n  - "), text
        text.encode()
        return "refused"
    "".join(lines).encode()
    assert not any("\n" in line for line in lines)
    categories = {each["id"]: each["name"] for each in content["categories"]}
    files = {each["id"]: Path(each["file_name"]) for each in content["images"]}
    used = Counter(
        (_picture(files[a["image_id"]]), categories[a["category_id"]], tuple(
            round(v, 3) for v in a["bbox"])) for a in content["annotations"]
    )  # fmt: skip
    told = " ".join(Recorded.examples)

    def whole(entry: Entry) -> bool:
        """Whether the file as a whole is faulty; XML and JSON say their encoding themselves."""
        faults = ("cut off", "empty", "other content")
        if kind == "CVAT":  # a file for all
            return False
        return entry.file_fault in (*faults, *(["another encoding"] if kind == "YOLO" else []))

    for entry in sorted(entries, key=whole):  # what others have is no longer used
        for each in entry.objects:
            box = expected(entry, each, kind)
            own = Path(entry.folder, f"{entry.name}.png")
            # Names that differ by letter case alone are one where a picture is missing.
            names = [_picture(own), *(_picture(f) for f in files.values() if _alike(f, own))]
            values = tuple(round(float(v), 3) for v in box or ())
            keys = [(name, each.label, values) for name in names]
            if key := next((key for key in keys if used[key]), None):
                used[key] -= 1
                continue
            if whole(entry):
                used -= Counter(key for key in used if key[0] in names)
                continue  # half of a YOLO file may hold whole lines, and a number cut short
            named = places[id(each)]
            assert named in told, (kind, each, entry, told)
        if whole(entry) and kind in ("Pascal VOC", "LabelMe"):
            assert entry.file_fault == "other content"  # others are refused
            assert entry.name in told
    assert not +used, (kind, +used, entries)  # nothing is invented
    return "used with a word" if told else "used"


def _picture(file: Path) -> str:
    return unicodedata.normalize("NFC", str(file.with_suffix("")))


def _alike(first: Path, second: Path) -> bool:
    return _picture(first).casefold() == _picture(second).casefold()


@pytest.mark.parametrize("kind", ["YOLO", "Pascal VOC", "LabelMe", "CVAT"])
def test_each_object_is_used_rightly_or_accounted(kind: str, monkeypatch) -> None:
    outcomes: Counter[str] = Counter()
    monkeypatch.setattr(convert, "MAX_UNUSABLE_SHARE", 1.0)

    @settings(
        max_examples=DRAWS or 60,
        deadline=None,
        derandomize=not DRAWS,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(data_sets())
    def use_one(entries: list[Entry]) -> None:
        with tempfile.TemporaryDirectory() as folder:
            outcomes[account(kind, entries, Path(folder), monkeypatch)] += 1

    use_one()
    print(kind, dict(outcomes))
    assert outcomes.keys() == {"refused", "used", "used with a word"}
