"""Files of figures: they open, are the same each time, and keep text as text."""

import logging
import warnings
from dataclasses import replace
from xml.etree import ElementTree

import matplotlib as mpl
import pytest
from PIL import Image
from sample_landscapes import SAMPLES, curve, plane

from ckptavg.errors import OutputError, UsageError
from ckptavg.plots.draw import render


def test_png_opens_and_is_small(tmp_path):
    path = tmp_path / "figure.png"
    plane().save_figure(path)
    with Image.open(path) as image:
        image.load()
        assert image.width == 800
        assert image.info["dpi"] == pytest.approx((100, 100), abs=0.1)
    assert path.stat().st_size < 200_000


def test_png_shows_a_landscape_in_a_notebook():
    assert plane(size=4)._repr_png_() == render(plane(size=4), "png")
    assert replace(plane(size=4), points=())._repr_png_() is None


def test_svg_text_is_text(tmp_path):
    path = tmp_path / "figure.svg"
    landscape = plane(size=4)
    named = replace(landscape.averages[0], name="a$b$<script>&.pt")
    replace(landscape, averages=(named,)).save_figure(path)
    root = ElementTree.parse(path).getroot()
    texts = ["".join(node.itertext()) for node in root.iter("{http://www.w3.org/2000/svg}text")]
    assert any(text.startswith("a$b$<script>&.pt: ") for text in texts)
    assert "top-1 error (%), evaluation data" in texts


def test_pdf_opens(tmp_path):
    path = tmp_path / "figure.PDF"
    curve(4).save_figure(path)
    assert path.read_bytes().startswith(b"%PDF")
    assert path.read_bytes().rstrip().endswith(b"%%EOF")


@pytest.mark.parametrize("form", ["png", "svg", "pdf"])
def test_figure_bytes_depend_on_the_landscape_alone(form):
    first = render(plane(size=4), form)
    with mpl.rc_context({"font.size": 20, "svg.hashsalt": "other", "savefig.dpi": 50}):
        assert render(plane(size=4), form) == first
    assert b"CreationDate" not in first
    assert b"<dc:date>" not in first


@pytest.mark.parametrize("name", SAMPLES)
def test_png_of_every_sample_is_below_the_limit(name):
    assert len(render(SAMPLES[name](), "png")) < 200_000


def test_figure_of_another_suffix_is_refused(tmp_path):
    with pytest.raises(UsageError, match=r"ends in \.png, \.svg or \.pdf"):
        plane(size=4).save_figure(tmp_path / "figure.jpg")
    with pytest.raises(OutputError):
        plane(size=4).save_figure(tmp_path / "missing" / "figure.png")
    assert not [*tmp_path.iterdir()]


def test_figure_notes_characters_without_a_glyph(tmp_path, caplog):
    landscape = plane(size=4)
    # A letter of Linear A.
    named = replace(landscape.averages[0], name="\U00010600")
    with caplog.at_level(logging.INFO, logger="ckptavg"), warnings.catch_warnings():
        warnings.simplefilter("error")
        replace(landscape, averages=(named,)).save_figure(tmp_path / "figure.png")
    assert "no font" in caplog.text
