"""Pages in a real browser, with texts that end quotes and tags in every place of a name."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
from browser import CONTRAST
from hostile import HOSTILE, SURROGATES

from flsl_d2.detection.detections import Detections
from flsl_d2.detection.finetune_report import Report, write_report
from flsl_d2.evaluation import TokenFeatures
from flsl_d2.studies.table import Cell, Measure, Row, Table
from flsl_d2.visualization import describe_encoder, write_page
from flsl_d2.visualization.html import render

NAMES = [*HOSTILE, *SURROGATES]


class Stub:
    """A detector that finds the first object of each image, and another where there is none."""

    def __init__(self, classes: dict[str, int], masks: bool) -> None:
        self.classes, self.masks = classes, masks

    def __call__(self, file: str) -> list[Detections]:
        number = self.classes[Path(file).name]
        boxes = np.array([[4, 4, 24, 24], [40, 30, 60, 44]], np.float32)
        masks = np.zeros((2, 48, 64), bool)
        for mask, (x0, y0, x1, y1) in zip(masks, boxes.astype(int), strict=True):
            mask[y0:y1, x0:x1] = True
        scores = np.array([0.9, 0.4], np.float32)
        found = np.array([number, 0])
        return [Detections(boxes, scores, found, (), masks if self.masks else None)]


def make_report(folder: Path, names: list[str], num_images: int, masks: bool = True) -> Report:
    """Write the report of a stub: each image has two objects, of which one is found."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    images, annotations, classes = [], [], {}
    for i in range(num_images):
        file = f"{i}.png"
        coarse = rng.integers(0, 256, (4, 5, 3), dtype=np.uint8)
        cv2.imwrite(str(folder / file), cv2.resize(coarse, (64, 48)))
        images.append({"id": i + 1, "file_name": file, "width": 64, "height": 48})
        classes[file] = i % len(names)
        for box in ([4, 4, 20, 20], [30, 4, 20, 20]):
            x, y, w, h = box
            corners = [[x, y, x + w, y, x + w, y + h, x, y + h]]
            annotations.append(
                {"id": len(annotations) + 1, "image_id": i + 1, "category_id": i % len(names) + 1,
                 "bbox": box, "area": w * h, "iscrowd": 0, "segmentation": corners if masks else []}
            )  # fmt: skip
    categories = [{"id": i + 1, "name": name} for i, name in enumerate(names)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "val.json").write_text(json.dumps(content))
    lines = [{"iteration": i, "total_loss": 3 - i / 9, "segm/AP": 2.0 * i} for i in range(9)]
    (folder / "metrics.json").write_text("\n".join(map(json.dumps, lines)))
    stub = Stub(classes, masks)
    hints, commands = names[:3], ["predict <b>", names[-1]]
    return write_report(folder, stub, str(folder / "val.json"), str(folder), hints, hints, commands)


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    return make_report(tmp_path_factory.mktemp("a") / "<i>run $x$", NAMES, 3 * len(NAMES)).page


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    rng = np.random.default_rng(0)
    import torch

    images = [rng.integers(0, 256, (64, 96, 3)).astype(np.uint8) for _ in range(2)]
    encoders = [
        describe_encoder(name, [TokenFeatures(torch.randn(24, 16), (4, 6), i) for i in images])
        for name in ("x" * 300, "".join(HOSTILE[:9]))
    ]
    path = tmp_path_factory.mktemp("b") / "index.html"
    write_page(path, encoders, [HOSTILE[3], SURROGATES[0]], [(0.5, 0.5)] * 2)
    return path


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    folder = tmp_path_factory.mktemp("c")
    measures = [Measure(f"a measure with a long name {i}", "higher", 1) for i in range(9)]
    rows = []
    for i, name in enumerate((NAMES[3], "x" * 60, "<b>", "plain")):
        cell = Cell((20.0 + i, 21.0 + i), ("why",) * (i == 3))
        rows.append(Row({"encoder": name}, {measure.name: cell for measure in measures}))
    cv2.imwrite(str(folder / "bars.png"), np.full((300, 900, 3), 255, np.uint8))
    pictures = dict.fromkeys(NAMES[:3], folder / "bars.png")
    section = {
        "title": "x" * 90,
        "texts": NAMES,
        "pictures": pictures,
        "width": 1150,
        "captions": True,
    }
    page = render(
        "study.html.j2", title=NAMES[3], table=Table(rows, measures), intro=NAMES,
        columns=["a", "b"], sections=[section], rows=[[name, "x" * 200] for name in NAMES],
        versions={}, details=[],
    )  # fmt: skip
    (folder / "index.html").write_text(page)
    return folder / "index.html"


@pytest.mark.parametrize("name", ["report", "tokens", "study"])
def test_a_page_fits_and_reads_in_every_window(name, request, browser):
    """No error, no request, nothing wider than the window, contrast of 4.5, light and dark."""
    browser.open(request.getfixturevalue(name))
    browser.wait("document.querySelector('canvas, figure img')")
    for width in (1400, 390):
        for dark in (False, True):
            browser.resize(width, dark)
            wide = browser.run("[document.documentElement.scrollWidth, innerWidth]")
            assert wide[0] <= wide[1] == width, (width, wide)
            assert browser.run(CONTRAST) == [], (width, dark)
    assert browser.errors == []
    assert browser.requests == []
    assert browser.run("typeof ran") == "undefined"


def test_the_report_filters_and_enlarges(report, browser):
    browser.open(report)
    count = "document.querySelectorAll('#pictures canvas').length"
    browser.wait("document.querySelector('canvas[data-drawn]')")
    text = "byId('counts').textContent"
    num = 3 * len(NAMES)
    assert browser.run(text).startswith(f"{num} right, {num} missed, 0 false alarms")
    assert browser.run(count) == 24
    browser.run("byId('more').click()")
    assert browser.run(count) == 48
    change = "byId('{0}').value = {1}; byId('{0}').dispatchEvent(new Event('{2}'))"
    browser.run(change.format("threshold", 0.3, "input"))
    assert f"{num} false alarms" in browser.run(text)
    browser.run(change.format("threshold", 0.95, "input"))
    assert browser.run(text).startswith(f"0 right, {2 * num} missed, 0 false")
    browser.run(change.format("filter", "'false'", "change"))
    assert browser.run(count) == 0
    browser.run(change.format("filter", "'missed'", "change"))
    browser.run("document.querySelectorAll('#classes button')[3].click()")
    assert browser.run(count) == 3
    assert browser.run("byId('class').value") == browser.run("String(data.shown[2])")
    assert browser.run("document.querySelectorAll('#curve path').length") == 6 + 2
    assert "masks" in browser.run("byId('curve-title').textContent")
    browser.run("document.querySelector('#kinds input').click()")
    assert "boxes" in browser.run("byId('curve-title').textContent")
    browser.run("document.querySelector('#pictures canvas').click()")
    browser.wait("document.querySelector('dialog[open] img').naturalWidth > 600")
    browser.run("document.querySelector('dialog').click()")
    assert browser.run("document.querySelectorAll('dialog').length") == 0
    assert browser.errors == []


def test_the_verdict_is_first_and_names_are_escaped(report):
    text = report.read_text()
    assert "mask AP still rises" in text
    assert text.index("mask AP still rises") < text.index("validation images")
    assert "<script>alert" not in text
    assert text.count("<script") == 2, "the data and the page's own script"
    figures = json.loads((report.parent / "results.json").read_text())["figures"]
    assert figures["bbox/AP"] == pytest.approx(figures["segm/AP"], abs=1)
    assert 40 < figures["bbox/AP50"] <= 51


def test_a_thousand_classes_make_a_small_page(tmp_path):
    names = [f"class {i}" for i in range(1000)]
    report = make_report(tmp_path / "run", names, 40, masks=False)
    assert report.page.stat().st_size < 1e6
    text = report.page.read_text()
    assert "Of 40 classes the 30 with the lowest AP are shown" in text
    assert all(len(note) < 400 for note in report.notes), "a note names ten classes at most"
    assert list(tmp_path.glob("run/*.png"))


def test_every_text_of_a_template_is_escaped():
    for text in NAMES:
        page = render(
            "finetune.html.j2", title=text, notes=[text], data={"shown": [], "x": text},
            num_classes=1, num_images=1, pictures={}, commands=[text], versions={text: text},
            details=[(text, text)],
        )  # fmt: skip
        assert "<script>alert" not in page
        page.encode()
