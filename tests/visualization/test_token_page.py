"""The page: it needs nothing but itself, holds the tokens it was given, and computes as Python."""

from __future__ import annotations

import base64
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from flsl_d2.errors import InputError
from flsl_d2.evaluation import TokenFeatures
from flsl_d2.visualization import describe_encoder, write_page
from flsl_d2.visualization.described import nearest_patches
from flsl_d2.visualization.maps import attention_values, mode_similarity_values

SCALES = (0.1, 1.0)
GRIDS = [(4, 6), (6, 6), (5, 4)]
NAMES = ["plain.jpg", "</script><b>&.png", "Ünïcode \U0001f408.jpg"]
WIDTHS = {"A": 16, "<i>B</i>": 24}


def tokens_of(width: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(width)
    return [3 * torch.randn(r * c, width, generator=generator) for r, c in GRIDS]


def features_of(width: int) -> list[TokenFeatures]:
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (r * 16, c * 16, 3)).astype(np.uint8) for r, c in GRIDS]
    return [TokenFeatures(*each) for each in zip(tokens_of(width), GRIDS, images, strict=True)]


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    encoders = [
        describe_encoder(name, features_of(width), SCALES) for name, width in WIDTHS.items()
    ]
    path = tmp_path_factory.mktemp("new") / "folder" / "index.html"
    points = [(0.5, 0.5), (0.0, 0.0), (0.99, 0.2)]
    size = write_page(path, encoders, NAMES, points, 1.0, 4, made="by <test>")
    assert size == path.stat().st_size
    assert [file.name for file in path.parent.iterdir()] == ["index.html"]
    return path


def content(page: Path) -> dict:
    text = page.read_text(encoding="utf-8")
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)
    return json.loads(found[1])


def decoded(text: str, kind: str) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), kind)


def test_page_is_self_contained(page):
    text = page.read_text(encoding="utf-8")
    outside = re.sub(r"[A-Za-z0-9+/=]{60,}", "", text)
    assert not re.search(r"https?:|[\"'(]//|@import|\burl\(|\bfetch\(|XMLHttp", outside)
    assert not re.search(r"<(link|img|iframe|object|embed)\b|\bsrc=|\bhref=", outside)
    assert "{{" not in text
    # Names cannot end the data's element or start an element of their own.
    assert text.count("</script>") == 2
    assert "default-src 'none'" in text


def test_embedded_tokens_are_the_given_ones_as_float16(page):
    data = content(page)
    assert [image["name"] for image in data["images"]] == NAMES
    assert [encoder["name"] for encoder in data["encoders"]] == list(WIDTHS)
    for encoder in data["encoders"]:
        for at, tokens, grid in zip(
            encoder["images"], tokens_of(encoder["width"]), GRIDS, strict=True
        ):
            assert (at["rows"], at["columns"]) == grid
            embedded = decoded(at["tokens"], "<f2").astype(np.float32)
            # Half the last bit of float16, and its smallest numbers.
            np.testing.assert_allclose(embedded, tokens.ravel().numpy(), rtol=2**-11, atol=1e-7)
            assert len(decoded(at["labels"][0], "<u2")) == len(tokens)
            assert len(decoded(at["pca"], "u1")) == 3 * len(tokens)


@pytest.mark.parametrize("value", [1e6, float("nan"), float("inf")])
def test_tokens_that_a_page_cannot_hold_are_refused(value):
    tokens = torch.randn(4, 8)
    tokens[2, 3] = value
    with pytest.raises(InputError, match="the tokens of 'x' reach"):
        describe_encoder("x", [TokenFeatures(tokens, (2, 2), np.zeros((32, 32, 3), np.uint8))])


def test_a_single_token_makes_a_page(tmp_path):
    image = np.zeros((8, 8, 3), np.uint8)
    encoder = describe_encoder("x", [TokenFeatures(torch.randn(1, 8), (1, 1), image)])
    write_page(tmp_path / "a.html", [encoder], ["a"], [(0.5, 0.5)])
    data = content(tmp_path / "a.html")
    assert data["encoders"][0]["positionR2"] is None
    assert data["colourPositionR2"] is None


SCRIPT = """
data.encoders.map((encoder) => {
  const sets = encoder.images.map((at) => Maths.decodeHalf(at.tokens));
  const columns = encoder.images.map((at) => at.columns);
  return sets.map((tokens, row) => {
    const token = (7 * row + 3) % (tokens.length / encoder.width);
    const query = Maths.tokenOf(tokens, encoder.width, token);
    const scale = 1.0 / Math.sqrt(encoder.width);
    return {
      token,
      attention: Array.from(Maths.attention(query, tokens, scale)),
      modes: [1, 2, 5].map((n) =>
        Array.from(Maths.cosines(Maths.mode(query, tokens, scale, n), tokens))),
      nearest: Maths.nearest(sets, columns, encoder.width, row, token, 6),
      labels: Array.from(Maths.decodeLabels(encoder.images[row].labels[1])),
    };
  });
})
"""


def test_browser_computes_what_python_does(page, browser):
    browser.open(page)
    for name, results in zip(WIDTHS, browser.run(SCRIPT), strict=True):
        sets, scale = features_of(WIDTHS[name]), WIDTHS[name] ** -0.5
        labels = describe_encoder(name, sets, (1.0,)).labels[1.0]
        for row, found in enumerate(results):
            each, token = sets[row], found["token"]
            expected = attention_values(each, token, scale).ravel() / len(each.tokens)
            # The page's tokens are float16, and the exponential magnifies their rounding.
            np.testing.assert_allclose(found["attention"], expected, rtol=0.02, atol=1e-5)
            for n, mode in zip((1, 2, 5), found["modes"], strict=True):
                expected = mode_similarity_values(each, token, scale, n)
                # The page's tokens are float16, through up to five mean-shift steps.
                np.testing.assert_allclose(mode, expected.ravel(), atol=5e-3)
            near = nearest_patches(sets, row, token, 6)
            assert [(i, j) for i, j, _ in found["nearest"]] == [(p.image, p.token) for p in near]
            np.testing.assert_array_equal(found["labels"], labels[row].ravel())
    bits = base64.b64encode(np.arange(65536, dtype="<u2").tobytes()).decode()
    values = browser.run(f"Array.from(Maths.decodeHalf('{bits}')).map(String)")
    with np.errstate(invalid="ignore"):
        expected = np.arange(65536, dtype="<u2").view("<f2").astype(np.float32)
    np.testing.assert_array_equal(np.array(values, np.float32), expected)


def test_clicks_and_controls_of_the_page(page, browser):
    browser.open(page)
    browser.wait("document.getElementById('check').textContent")
    assert browser.run("document.getElementById('check').textContent").startswith("Checked against")
    before = browser.run("document.querySelector('#nearest').innerText")
    browser.run("document.querySelectorAll('#pictures canvas')[3].click()")
    assert browser.run("data.images[0].point") != [0.5, 0.5]
    assert browser.run("document.querySelector('#nearest').innerText") != before
    shown = "document.querySelectorAll('#pictures canvas').length"
    count = browser.run(shown)
    browser.run("document.querySelector('#maps input').click()")
    assert browser.run(shown) == count - 2 * len(GRIDS)
    browser.run(
        "byId('iterations').value = 1; byId('iterations').dispatchEvent(new Event('input'))"
    )
    assert browser.run("byId('iterations-shown').textContent") == "1"
    assert browser.run("state.iterations") == 1
    numbers = browser.run("byId('numbers').innerText")
    browser.run("byId('scale').value = 0; byId('scale').dispatchEvent(new Event('change'))")
    assert browser.run("byId('numbers').innerText") != numbers
    assert not browser.errors
