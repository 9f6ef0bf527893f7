"""Annotations in other formats than COCO's: recognised by their content and converted.

YOLO and LabelMe are read by ``supervision``, Pascal VOC and CVAT by ``globox`` (the extra
``formats``), except for CVAT's polygons, which are read here. A converted file holds boxes, and
masks where the source has polygons.
"""

from __future__ import annotations

import json
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pycocotools.mask as mask_util
import yaml

from flsl_d2.annotations.coco_file import read_json
from flsl_d2.errors import InputError
from flsl_d2.files import write_text
from flsl_d2.images.listing import find_images
from flsl_d2.images.opening import MAX_PIXELS_LIMIT
from flsl_d2.images.reader import ImageFile, picture_size

_KNOWN = (
    "COCO (one .json), YOLO (a folder of .txt with data.yaml or classes.txt), Pascal VOC (a folder "
    "of .xml), LabelMe (a folder of .json) and CVAT for images 1.1 (one .xml)"
)
_NAME_FILES = ("data.yaml", "data.yml", "dataset.yaml", "classes.txt", "obj.names")


@dataclass(frozen=True)
class AnnotationSource:
    """Annotations of a recognised format.

    Attributes:
        kind: name of the format: ``COCO``, ``YOLO``, ``Pascal VOC``, ``LabelMe`` or ``CVAT``.
        path: file, or folder with a file for each image.
        files: the annotation files.
    """

    kind: str
    path: Path
    files: tuple[Path, ...]


@dataclass(frozen=True)
class _Object:
    """One annotated object: class, box x0, y0, x1, y1 in pixels, and mask (H, W) if known."""

    label: str
    box: tuple[float, float, float, float]
    mask: np.ndarray | None = None


def recognise_annotations(path: str | Path) -> AnnotationSource:
    """Recognise the format of annotations by their content.

    Raises:
        InputError: nothing is there, or nothing of a known format.
    """
    path = Path(path).expanduser()
    if path.is_file():
        return _recognise_file(path)
    if not path.is_dir():
        raise InputError(f"the annotations '{path}' do not exist; check the path.")
    for kind, suffix, is_kind in (
        ("Pascal VOC", ".xml", lambda file: _xml_root(file) == "annotation"),
        ("LabelMe", ".json", _is_labelme),
        ("YOLO", ".txt", _is_yolo),
    ):
        found = sorted(path.rglob(f"*{suffix}"))
        files = [f for f in found if f.name not in _NAME_FILES and not f.name.startswith(".")]
        if files and any(is_kind(file) for file in files[:20]):
            return AnnotationSource(kind, path, tuple(file for file in files if is_kind(file)))
    raise InputError(
        f"the folder '{path}' holds no annotations of a known format; known: {_KNOWN}."
    )


def _recognise_file(path: Path) -> AnnotationSource:
    if path.suffix.lower() in (".yaml", ".yml"):
        return recognise_annotations(path.parent)
    if path.suffix.lower() == ".xml":
        root = _xml_root(path)
        if root == "annotations":
            return AnnotationSource("CVAT", path, (path,))
        if root == "annotation":
            raise InputError(f"'{path}' annotates one image; give the folder of all such files.")
        raise InputError(f"'{path}' is XML of an unknown format; known: {_KNOWN}.")
    if _is_labelme(path):
        raise InputError(f"'{path}' annotates one image; give the folder of all such files.")
    return AnnotationSource("COCO", path, (path,))


def _xml_root(path: Path) -> str:
    """Name of an XML file's outermost element; empty where it is no XML."""
    try:
        with path.open("rb") as file:
            _, root = next(iter(ElementTree.iterparse(file, events=("start",))))
    except (OSError, ElementTree.ParseError, StopIteration):
        return ""
    return root.tag


def _is_labelme(path: Path) -> bool:
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and "shapes" in content and "imagePath" in content


def _is_yolo(path: Path) -> bool:
    """Whether every line is a class number and at least four numbers; an empty file is none."""
    try:
        lines = [line.split() for line in path.read_text().splitlines() if line.strip()]
        return all(len(line) >= 5 and all(map(_is_number, line)) for line in lines)
    except (OSError, UnicodeDecodeError):
        return False


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def convert_to_coco(
    source: AnnotationSource, images: str | Path, output: str | Path, labels: Sequence[str] = ()
) -> str:
    """Write annotations as a file in COCO's format.

    Args:
        source: annotations of another format than COCO's.
        images: folder of the pictures, with subfolders.
        output: JSON file to write.
        labels: classes that the file gets even if no object has them, as a second part of a data
            set needs.

    Returns:
        A sentence of what was found.

    Raises:
        InputError: the extra is not installed, the annotations cannot be read, or none of them
            belongs to a picture.
    """
    read = {"YOLO": _yolo, "LabelMe": _labelme, "Pascal VOC": _voc, "CVAT": _cvat}[source.kind]
    root = Path(images).expanduser()
    pictures = _Pictures(root)
    left_out: Counter[str] = Counter()
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            objects = dict(read(source, pictures, left_out))
    except ImportError as error:
        raise InputError(
            f"'{source.path}' is in {source.kind}'s format, which needs the extra formats "
            f"({error.name} is not installed); run pip install 'flsl-d2[formats]'."
        ) from error
    except InputError:
        raise
    except Exception as error:  # the converters check little: KeyError, ParsingError, ValueError
        raise InputError(
            f"the annotations '{source.path}' ({source.kind}) cannot be read "
            f"({' '.join(str(error).split()) or type(error).__name__}); correct the file."
        ) from error
    unsupported = {str(w.message) for w in caught if issubclass(w.category, UserWarning)}
    if not any(objects.values()):
        raise InputError(
            f"the annotations '{source.path}' ({source.kind}) hold no box of a picture below "
            f"'{root}'; check both paths."
        )
    content = _coco(objects, pictures, labels)
    write_text(output, json.dumps(content))
    notes = [f"{count} {what} are left out" for what, count in left_out.items()]
    return "; ".join(
        [
            f"{source.kind} annotations: {len(content['annotations'])} objects of "
            f"{len(content['categories'])} classes in {len(content['images'])} pictures",
            *notes,
            *sorted(unsupported),
        ]
    )


class _Pictures:
    """Pictures of a folder by relative path, file name and stem."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.files = [str(Path(file).relative_to(root)) for file in find_images(root)]
        self._by_name: dict[str, list[str]] = defaultdict(list)
        for file in self.files:
            for key in (file, Path(file).name, Path(file).stem):
                if file not in self._by_name[key]:
                    self._by_name[key].append(file)

    def find(self, name: str, near: Path | None = None) -> str | None:
        """Find the picture that a name or stem means.

        Args:
            name: relative path, file name or stem.
            near: annotation file; where several pictures have the name, the one whose folders
                have the most names in common with the file's is taken.
        """
        candidates = self._by_name.get(name) or self._by_name.get(Path(name).name) or []
        if near is None or len(candidates) < 2:
            return candidates[0] if candidates else None
        parts = set(near.parts)
        return max(candidates, key=lambda file: len(parts & set(Path(file).parent.parts)))

    def size(self, file: str) -> tuple[int, int]:
        """Height and width of the upright picture."""
        path = str(self.root / file)
        try:
            return picture_size(path)[0]
        except OSError:
            return ImageFile(path, MAX_PIXELS_LIMIT).shape


_Objects = Iterator[tuple[str, list[_Object]]]


def _yolo(source: AnnotationSource, pictures: _Pictures, left_out: Counter[str]) -> _Objects:
    from supervision.dataset.formats.yolo import yolo_annotations_to_detections

    names = _yolo_names(source)
    for file in source.files:
        picture = pictures.find(file.stem, near=file)
        if picture is None:
            left_out["label files without a picture"] += 1
            continue
        height, width = pictures.size(picture)
        lines = [line for line in file.read_text().splitlines() if line.strip()]
        polygons = any(len(line.split()) > 6 for line in lines)
        found = yolo_annotations_to_detections(lines, (width, height), with_masks=polygons)
        yield picture, _objects(found, names, file)


def _yolo_names(source: AnnotationSource) -> list[str]:
    folders = [source.path, source.path.parent, *{file.parent for file in source.files}]
    for name in _NAME_FILES:
        for folder in folders:
            file = folder / name
            if not file.is_file():
                continue
            if file.suffix in (".txt", ".names"):
                return [line.strip() for line in file.read_text().splitlines() if line.strip()]
            names = (yaml.safe_load(file.read_text()) or {}).get("names")
            if isinstance(names, dict):
                return [str(names[key]) for key in sorted(names, key=int)]
            if isinstance(names, list):
                return [str(each) for each in names]
    raise InputError(
        f"'{source.path}' holds YOLO labels and no class names; put a data.yaml with names or a "
        "classes.txt there."
    )


def _labelme(source: AnnotationSource, pictures: _Pictures, left_out: Counter[str]) -> _Objects:
    from supervision.dataset.formats.labelme import labelme_shapes_to_detections

    contents = {file: read_json(file) for file in source.files}
    labels = sorted({str(s.get("label")) for c in contents.values() for s in c["shapes"]})
    numbers = {label: number for number, label in enumerate(labels)}
    for file, content in contents.items():
        picture = pictures.find(content["imagePath"].replace("\\", "/"), near=file)
        if picture is None:
            left_out["label files without a picture"] += 1
            continue
        height, width = pictures.size(picture)
        shapes = [{**shape, "label": str(shape.get("label"))} for shape in content["shapes"]]
        polygons = any(shape.get("shape_type") == "polygon" for shape in shapes)
        found = labelme_shapes_to_detections(shapes, numbers, (width, height), polygons)
        yield picture, _objects(found, labels, file)


def _objects(found: Any, names: Sequence[str], file: Path) -> list[_Object]:
    """Objects of a ``supervision.Detections``."""
    objects = []
    for index in range(len(found)):
        number = int(found.class_id[index])
        if not 0 <= number < len(names):
            raise InputError(
                f"'{file}' has class {number}, and there are {len(names)} class names; add the "
                "names or correct the numbers (they start at 0)."
            )
        mask = None if found.mask is None else np.asarray(found.mask[index])
        x0, y0, x1, y1 = (float(value) for value in found.xyxy[index])
        objects.append(_Object(names[number], (x0, y0, x1, y1), mask))
    return objects


def _voc(source: AnnotationSource, pictures: _Pictures, left_out: Counter[str]) -> _Objects:
    import globox

    for file in source.files:
        annotation = globox.Annotation.from_pascal_voc(file)
        picture = pictures.find(annotation.image_id, file) or pictures.find(file.stem, file)
        if picture is None:
            left_out["label files without a picture"] += 1
            continue
        yield picture, _of_globox(annotation)


def _cvat(source: AnnotationSource, pictures: _Pictures, left_out: Counter[str]) -> _Objects:
    import globox

    image_nodes = list(ElementTree.parse(source.path).getroot().iter("image"))
    shapes = Counter(child.tag for node in image_nodes for child in node)
    for shape in ("mask", "polyline", "points", "ellipse", "cuboid", "skeleton"):
        if shapes[shape]:
            left_out[f"shapes of the kind {shape} (CVAT's export 'COCO 1.0' keeps them)"] = shapes[
                shape
            ]
    for node in image_nodes:
        annotation = globox.Annotation.from_cvat(node)
        picture = pictures.find(annotation.image_id)
        if picture is None:
            left_out["images without a picture"] += 1
            continue
        polygons = [_cvat_polygon(each, pictures.size(picture)) for each in node.iter("polygon")]
        yield picture, [*_of_globox(annotation), *polygons]


def _cvat_polygon(node: ElementTree.Element, size: tuple[int, int]) -> _Object:
    """Object of a polygon, whose points are written as ``x,y;x,y;...`` in pixels."""
    points = [
        [float(value) for value in pair.split(",")] for pair in node.attrib["points"].split(";")
    ]
    corners = np.clip(np.array(points), 0, size[::-1])
    code = mask_util.merge(mask_util.frPyObjects([corners.ravel().tolist()], *size))
    x0, y0 = corners.min(axis=0).tolist()
    x1, y1 = corners.max(axis=0).tolist()
    return _Object(node.attrib["label"], (x0, y0, x1, y1), mask_util.decode(code))


def _of_globox(annotation: Any) -> list[_Object]:
    return [
        _Object(
            str(box.label), (float(box.xmin), float(box.ymin), float(box.xmax), float(box.ymax))
        )
        for box in annotation.boxes
    ]


def _coco(
    objects: dict[str, list[_Object]], pictures: _Pictures, labels: Sequence[str]
) -> dict[str, list[Any]]:
    found = {each.label for listed in objects.values() for each in listed}
    ids = {label: number for number, label in enumerate(sorted(found.union(labels)), 1)}
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for image_id, (file, listed) in enumerate(sorted(objects.items()), 1):
        height, width = pictures.size(file)
        images.append({"id": image_id, "file_name": file, "height": height, "width": width})
        for each in listed:
            x0, y0, x1, y1 = each.box
            entry: dict[str, Any] = {
                "id": len(annotations) + 1,
                "image_id": image_id,
                "category_id": ids[each.label],
                "bbox": [x0, y0, x1 - x0, y1 - y0],
                "area": (x1 - x0) * (y1 - y0),
                "iscrowd": 0,
            }
            if each.mask is not None and each.mask.any():
                code = mask_util.encode(np.asfortranarray(each.mask, dtype=np.uint8))
                entry["segmentation"] = {"size": code["size"], "counts": code["counts"].decode()}
                entry["area"] = float(mask_util.area(code))
            annotations.append(entry)
    categories = [{"id": number, "name": label} for label, number in ids.items()]
    return {"images": images, "annotations": annotations, "categories": categories}
