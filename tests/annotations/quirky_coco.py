"""COCO data sets with quirks of strangers' files, drawn by hypothesis."""

from __future__ import annotations

import codecs
import copy
import io
import json
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import pycocotools.mask
from hypothesis import strategies as st
from PIL import Image

HEIGHT, WIDTH = 24, 32
NAN = float("nan")

Coco = dict[str, Any]
Quirk = tuple[str, int, Any]  # kind, index of the entry that it hits, value


def plain_coco(num_images: int) -> Coco:
    """Two drawn objects for each image, with polygons."""
    images, annotations = [], []
    for i in range(num_images):
        name = f"bilder/é {i}.png" if i % 2 else f"img_{i}.png"
        images.append({"id": i + 1, "file_name": name, "height": HEIGHT, "width": WIDTH})
        for k, (x, y, w, h) in enumerate(((2 + i, 3, 9, 8), (17, 4 + i, 12, 10))):
            polygon = [x, y, x + w, y, x + w, y + h, x, y + h]
            annotations.append(
                {
                    "id": len(annotations) + 1, "image_id": i + 1, "category_id": k + 1,
                    "bbox": [x, y, w, h], "area": w * h, "iscrowd": 0, "segmentation": [polygon],
                }
            )  # fmt: skip
    categories = [{"id": 1, "name": "red"}, {"id": 2, "name": "blue"}]
    return {"images": images, "annotations": annotations, "categories": categories}


def _mask(as_text: bool) -> dict[str, Any]:
    pixels = np.zeros((HEIGHT, WIDTH), np.uint8, order="F")
    pixels[4:12, 5:15] = 1
    mask = pycocotools.mask.encode(pixels)
    if as_text:
        return {"size": mask["size"], "counts": mask["counts"].decode()}
    runs = np.flatnonzero(np.diff(np.pad(pixels.flatten("F"), 1, constant_values=2)))
    return {"size": [HEIGHT, WIDTH], "counts": np.diff(runs).tolist()}


ODD_VALUES: list[Any] = [
    None, True, -1, 0, 0.5, "3", "96.0", "", [], {}, [1], 10**400, NAN, float("inf"), "\ud800",
    "a\nb",
]  # fmt: skip
SEGMENTATIONS: list[Any] = [
    None, [], [[]], [[1, 1, 9, 9]], [[1, 1, 9, 1, 9]], [1, 1, 9, 1, 9, 9], "x", [["a"] * 6],
    [[NAN] * 6], [[1, 1, 9, 1, 9, 9], [2, 2]], [[2, 2], [1, 1, 9, 1, 9, 9]], [[3] * 6], {},
    [[1, 1, 2, 2], [1, 1, 9, 1, 9, 9]], [[0.1, 0.1, 0.5, 0.1, 0.5, 0.5]], [[-9, 1, 9, 1, 99, 99]],
    _mask(True), _mask(False), {"size": [HEIGHT, WIDTH], "counts": [HEIGHT * WIDTH]},
    {"size": [HEIGHT, WIDTH], "counts": [5]}, {"size": [WIDTH, HEIGHT], "counts": [768]},
    {"size": [HEIGHT, WIDTH], "counts": "PP"}, {"size": [24.0, 32.0], "counts": [10, 758]},
]  # fmt: skip
BOXES: list[Any] = [
    None, [], [1, 2, 3], [1, 2, 0, 4], [1, 2, -3, 4], [NAN, 1, 2, 3], [1, 2, float("inf"), 3],
    ["1", "2", "3", "4"], [99, 99, 4, 4], [-3, -3, 9, 9], [0.1, 0.1, 0.2, 0.2], [1, 2, 1e-9, 4],
    [20, 20, 30, 30], [1, 2, True, 4], {"x": 1}, [[1, 2, 3, 4]],
]  # fmt: skip

ENTRY_QUIRKS: dict[str, tuple[str, str, list[Any]]] = {
    "image id": ("images", "id", [*ODD_VALUES, 2, 1.0]),
    "height": ("images", "height", [*ODD_VALUES, 24.0, 32, "24"]),
    "width": ("images", "width", [*ODD_VALUES, 32.0, 24]),
    "file name": ("images", "file_name", [*ODD_VALUES, "no.png", "../x", "/etc/passwd", "a\0"]),
    "annotation id": ("annotations", "id", [*ODD_VALUES, 1, 2.0]),
    "image of annotation": ("annotations", "image_id", [*ODD_VALUES, 2, 1.0, 99]),
    "category of annotation": ("annotations", "category_id", [*ODD_VALUES, 2, 1.0, 9]),
    "area": ("annotations", "area", ODD_VALUES),
    "iscrowd": ("annotations", "iscrowd", [*ODD_VALUES, 1, False, 1.0, 2]),
    "ignore": ("annotations", "ignore", [0, 1, None, "0"]),
    "box": ("annotations", "bbox", BOXES),
    "segmentation": ("annotations", "segmentation", SEGMENTATIONS),
    "category id": ("categories", "id", [*ODD_VALUES, 2, 1.0]),
    "category name": ("categories", "name", [*ODD_VALUES, "blue"]),
}

# Quirks of all entries alike, as a tool writes them.
WHOLE_QUIRKS: dict[str, Callable[[Coco, Any], None]] = {
    "all segmentations": lambda c, v: [a.update(segmentation=v) for a in c["annotations"]],
    "all crowds": lambda c, v: [a.update(iscrowd=1) for a in c["annotations"]],
    "a class of crowds": lambda c, v: [
        a.update(iscrowd=1) for a in c["annotations"] if a.get("category_id") == 1
    ],
    "no area": lambda c, v: [a.pop("area", 0) for a in c["annotations"]],
    "no iscrowd": lambda c, v: [a.pop("iscrowd", 0) for a in c["annotations"]],
    "no ids": lambda c, v: [a.pop("id", 0) for a in c["annotations"]],
    "corners": lambda c, v: [_corners(a) for a in c["annotations"]],
    "shares": lambda c, v: [_shares(a) for a in c["annotations"]],
    "ids from 0": lambda c, v: [a.update(id=i) for i, a in enumerate(c["annotations"])],
    "ids as text": lambda c, v: _text_ids(c),
    "no annotations": lambda c, v: c.pop("annotations"),
    "empty annotations": lambda c, v: c.update(annotations=[]),
    "no categories": lambda c, v: c.pop("categories"),
    "an annotation that is none": lambda c, v: c["annotations"].append(v),
    "an image that is none": lambda c, v: c["images"].append(v),
    "an image without objects": lambda c, v: c.update(
        annotations=[a for a in c["annotations"] if a.get("image_id") != 1]
    ),
    "backslashes": lambda c, v: _names(c, lambda n: n.replace("/", "\\")),
    "folder repeated": lambda c, v: _names(c, lambda n: "images/" + n),
    "URL": lambda c, v: _names(c, quote),
    "upper case": lambda c, v: _names(c, str.upper),
    "unicode form": lambda c, v: _names(c, lambda n: unicodedata.normalize("NFD", n)),
    "absolute": lambda c, v: _names(c, lambda n: "/home/me/" + n),
}  # fmt: skip


def _names(coco: Coco, change: Callable[[str], str]) -> None:
    for image in coco["images"]:
        if isinstance(image, dict) and isinstance(image.get("file_name"), str):
            image["file_name"] = change(image["file_name"])


def _corners(annotation: Coco) -> None:
    x, y, w, h = annotation["bbox"]
    annotation["bbox"] = [x, y, x + w, y + h]


def _shares(annotation: Coco) -> None:
    x, y, w, h = annotation["bbox"]
    annotation["bbox"] = [x / WIDTH, y / HEIGHT, w / WIDTH, h / HEIGHT]


def _text_ids(coco: Coco) -> None:
    for key, field in (
        ("images", "id"), ("annotations", "image_id"),
        ("categories", "id"), ("annotations", "category_id"),
    ):  # fmt: skip
        for entry in coco[key]:
            entry[field] = str(entry[field])


PICTURES = ["RGB", "L", "LA", "RGBA", "P", "1", "CMYK", "I;16", "F", "empty", "cut", "html",
            "turned", "other size"]  # fmt: skip
ENCODINGS = ["utf-8", "utf-8-sig", "utf-16", "cut", "latin-1"]


def picture(kind: str) -> bytes:
    """Make an image file of the expected size, or one that cannot be used."""
    rng = np.random.default_rng(0)
    rgb = Image.fromarray(rng.integers(0, 255, (HEIGHT, WIDTH, 3), dtype=np.uint8))
    stream = io.BytesIO()
    if kind == "turned":
        exif = Image.Exif()
        exif[0x0112] = 6
        rgb.save(stream, "PNG", exif=exif)
    elif kind == "other size":
        rgb.resize((9, 9)).save(stream, "PNG")
    elif kind in ("I;16", "F"):
        values = np.asarray(rgb.convert("L")).astype(np.uint16 if kind == "I;16" else np.float32)
        Image.fromarray(values).save(stream, "TIFF")
    else:
        mode = kind if kind not in ("empty", "cut", "html") else "RGB"
        rgb.convert(mode).save(stream, "TIFF" if mode == "CMYK" else "PNG")
    data = stream.getvalue()
    damaged = {"empty": b"", "cut": data[: len(data) // 2], "html": b"<html>404</html>"}
    return damaged.get(kind, data)


@st.composite
def quirky_files(draw: st.DrawFn) -> tuple[Coco, list[str], str]:
    """Draw a COCO file with up to three quirks, the kinds of its pictures, and its encoding."""
    coco = plain_coco(draw(st.integers(1, 3)))
    kinds = ["RGB"] * len(coco["images"])
    for _ in range(draw(st.sampled_from([1, 2, 3, 0]))):
        apply = draw(st.sampled_from(["entry", "entry", "whole", "whole", "picture"]))
        if apply == "picture":
            kinds[draw(st.integers(0, len(kinds) - 1))] = draw(st.sampled_from(PICTURES))
        elif apply == "whole":
            change = WHOLE_QUIRKS[draw(st.sampled_from(sorted(WHOLE_QUIRKS)))]
            value = draw(st.sampled_from(SEGMENTATIONS))
            before = copy.deepcopy(coco)
            try:
                change(coco, copy.deepcopy(value))
            except (KeyError, TypeError, ValueError, AttributeError):
                coco = before  # an earlier quirk leaves nothing that it could change
        else:
            key, field, values = ENTRY_QUIRKS[draw(st.sampled_from(sorted(ENTRY_QUIRKS)))]
            entries = [e for e in coco.get(key, []) if isinstance(e, dict)]
            value = draw(st.sampled_from(values))
            if entries:
                entry = draw(st.sampled_from(entries))
                entry[field] = copy.deepcopy(value)
                if value is None and draw(st.booleans()):
                    del entry[field]
    encoding = draw(st.sampled_from(ENCODINGS)) if draw(st.integers(0, 9)) == 0 else "utf-8"
    return coco, kinds, encoding


def write_files(folder: Path, coco: Coco, kinds: list[str], encoding: str) -> tuple[Path, Path]:
    """Write pictures under their plain names, and the annotation file; their two paths."""
    root = folder / "images"
    for image, kind in zip(plain_coco(len(kinds))["images"], kinds, strict=True):
        path = root / image["file_name"]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture(kind))
    text = json.dumps(coco, ensure_ascii=encoding != "latin-1")
    plain = text.encode("utf-8", "surrogatepass")  # half a surrogate pair is one of the quirks
    data = {
        "utf-8-sig": codecs.BOM_UTF8 + plain,
        "utf-16": json.dumps(coco).encode("utf-16"),
        "cut": plain[:-20],
        "latin-1": text.encode("latin-1", "replace"),
    }.get(encoding, plain)
    (folder / "a.json").write_bytes(data)
    return folder / "a.json", root
