import base64
import io
import re

import numpy as np
import pytest
from jinja2 import UndefinedError
from markupsafe import Markup
from matplotlib.figure import Figure
from PIL import Image

from diffstill.html import (
    _LIGHT,
    Curve,
    GridRow,
    Page,
    Setting,
    Verdict,
    _draw_accuracy,
    data_uri,
    figures,
    percent,
    plain,
    plural,
    png,
    render,
    signed,
    strip,
    svg,
)
from diffstill.metrics import Summary
from diffstill.scores import Cell, Gain

HOSTILE = '<img src="http://evil.example/x" onerror="alert(1)">$a$'


def make_cell(source, size, mean, student="convnet-2", **changes):
    summary = Summary(mean, 0.02, 6)
    values = {"over_random": None, "over_untuned": None, "label_robust_score": None, "leads": False} | changes
    return Cell(source, student, size, summary, mean - 0.03, mean + 0.03, summary, summary, 20.0, **values)


def make_page(**changes):
    pictures = np.arange(2 * 64, dtype=np.uint8).reshape(2, 1, 8, 8)
    columns = {"step": [1, 2, 3], "loss": [3, 2, 1], "loss_real": [0, 0.5, 0.4], "loss_gen": [0, 0.3, 0.2], "memory_real": [1, 2, 3]}
    values = {
        "title": "Distilled digits",
        "lead": "One sentence.",
        "facts": [("Size", "8 × 8")],
        "cautions": [],
        "headline": Verdict("gain", "Better."),
        "verdicts": [Verdict("gain", "better.", "convnet-2:")],
        "cells": [make_cell("random", 1, 0.5), make_cell("distilled", 1, 0.6, over_random=Gain(10.0, 4.0, 16.0), leads=True)],
        "chance": 0.1,
        "caption": "A caption.",
        "footnotes": ["A footnote."],
        "grid": [GridRow("zero", {"Real": pictures, "Distilled": pictures})],
        "grid_caption": "Pictures.",
        "curves": [Curve(0, columns | {"memory_gen": [1, 2, 3]})],
        "capacities": (4, 4),
        "memories": True,
        "memory_caption": "Curves.",
        "settings": {"prepare": [Setting("side", "8", "pixels")]},
        "digests": [("images", "abc")],
    }
    return Page(**(values | changes))


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [(0.1, 2.0, "gain"), (-2.0, -0.1, "loss"), (-1.0, 1.0, "unclear"), (0.0, 1.0, "unclear"), (None, None, "unknown")],
)
def test_a_gain_is_clear_only_if_zero_lies_outside_its_interval(low, high, verdict):
    assert Gain(0.5, low, high).verdict == verdict


@pytest.mark.parametrize(
    ("points", "text"), [(5.25, "+5.2"), (-3.0, "\u22123.0"), (0.0, "0.0"), (0.04, "+0.04"), (-0.0006, "\u22120.001"), (1e-9, "0.0")]
)
def test_signed_points_never_round_a_side_of_zero_away(points, text):
    assert signed(points) == text


def test_numbers_read_well():
    assert percent(0.62667) == "62.7"
    assert (plural(1, "run"), plural(2, "run")) == ("1 run", "2 runs")
    assert (plain(1234567), plain(12.5), plain(20.0)) == ("1\u202f234\u202f567", "12.5", "20")


def test_strip_repeats_the_pixels_of_small_pictures():
    pictures = np.random.default_rng(0).integers(0, 256, (3, 3, 4, 4), dtype=np.uint8)
    row = np.asarray(strip(pictures, tile=12, gap=2))
    assert row.shape == (12, 3 * 12 + 2 * 2, 4)
    for number, picture in enumerate(pictures):
        left = number * 14
        np.testing.assert_array_equal(row[:, left : left + 12, :3], picture.transpose(1, 2, 0).repeat(3, 0).repeat(3, 1))
    assert (row[:, 12:14, 3] == 0).all(), "gaps are transparent"


def test_strip_reduces_large_pictures_smoothly():
    checker = np.indices((64, 64)).sum(0) % 2 * 255
    row = np.asarray(strip(checker.astype(np.uint8)[None, None], tile=16))
    assert row.shape == (16, 16, 4)
    assert np.abs(row[4:12, 4:12, 0].astype(int) - 127).max() < 10


def test_data_uri_holds_the_image():
    image = strip(np.full((1, 1, 4, 4), 9, np.uint8), tile=4)
    kind, content = data_uri(image).split(",")
    assert kind == "data:image/png;base64"
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(base64.b64decode(content)))), np.asarray(image))


def test_svg_is_inline_named_and_free_of_outside_names():
    figure = Figure()
    figure.subplots().plot([1, 2], [3, 4], marker="o", color="#000001")
    found = svg(figure, "curve", 'a "loss" <curve>')
    assert isinstance(found, Markup)
    assert found.startswith('<svg role="img" aria-label="a &#34;loss&#34; &lt;curve&gt;"')
    assert "http" not in found
    assert "var(--ink)" in found
    ids = set(re.findall(r'\sid="([^"]*)"', found))
    used = set(re.findall(r'(?:url\(#|href="#)([^")]*)', found))
    assert all(name.startswith("curve-") for name in ids)
    assert used
    assert used <= ids
    assert not re.search(r'<svg[^>]* (width|height)="', found)


def test_texts_from_outside_are_escaped_everywhere():
    page = make_page(
        title=HOSTILE,
        lead=HOSTILE,
        facts=[(HOSTILE, HOSTILE)],
        cautions=[HOSTILE],
        headline=Verdict("gain", HOSTILE),
        verdicts=[Verdict("gain", HOSTILE, HOSTILE)],
        cells=[make_cell("random", 1, 0.5, student=HOSTILE)],
        caption=HOSTILE,
        footnotes=[HOSTILE],
        grid=[GridRow(HOSTILE, make_page().grid[0].pictures)],
        grid_caption=HOSTILE,
        memory_caption=HOSTILE,
        settings={HOSTILE: [Setting(HOSTILE, HOSTILE, HOSTILE)]},
        digests=[(HOSTILE, HOSTILE)],
    )
    text = render(page)
    assert '<img src="http' not in text
    assert not re.search(r"<[^>]*\sonerror=\"alert", text.replace("&lt;", "").replace("&#34;", ""))
    assert text.count("&lt;img src=") >= 20


def test_render_and_figures_repeat_to_the_byte():
    page = make_page()
    assert render(page) == render(page)
    assert figures(page) == figures(page)


def test_a_themed_colour_reaches_no_png_and_every_svg():
    text = render(make_page())
    assert not re.search(r"#0000[0-9a-f]{2}\b", text)
    with Image.open(io.BytesIO(figures(make_page())["loss.png"])) as image:
        colours = {colour for _, colour in image.convert("RGB").getcolors(1 << 24)}
    assert (0x24, 0x56, 0xC8) in colours


def test_png_has_no_metadata_but_its_resolution():
    figure = Figure(figsize=(1, 1))
    with Image.open(io.BytesIO(png(figure, dpi=50))) as image:
        assert image.size == (50, 50)
        assert set(image.info) == {"dpi"}


def test_without_memories_their_figures_are_left_out():
    assert "Memory fill" in render(make_page())
    assert "Memory fill</text>" not in render(make_page(memories=False))


def test_pixelated_for_small_pictures_only():
    large = np.zeros((1, 3, 128, 128), np.uint8)
    assert make_page().pixelated
    assert not make_page(grid=[GridRow("zero", {"Real": large})]).pixelated
    assert 'class="pictures smooth"' in render(make_page(grid=[GridRow("zero", {"Real": large})]))


def test_the_plot_has_the_line_of_chance():
    axes = Figure().subplots()
    _draw_accuracy(axes, make_page(chance=0.25), "convnet-2", _LIGHT)
    (line,) = (line for line in axes.lines if line.get_label() == "chance")
    assert list(line.get_ydata()) == [25, 25]
    assert axes.get_ylim()[0] < 25
    assert ">chance</text>" in render(make_page())


def test_cautions_stand_before_the_verdict():
    text = render(make_page(cautions=["Students guess."]))
    assert text.index("<p>Students guess.</p>") < text.index("<p>Better.</p>")


def test_students_have_their_own_columns():
    cells = [make_cell("random", 1, 0.5), make_cell("random", 10, 0.6), make_cell("random", 50, 0.6, student="other"), make_cell("full", None, 0.9)]
    page = make_page(cells=cells)
    assert page.students == {"convnet-2": [1, 10], "other": [50]}
    text = render(page)
    assert '<th scope="colgroup" colspan="2">convnet-2</th>' in text
    assert "not run" in text, "the other student has no full-data run"


def test_an_unknown_name_in_the_template_is_an_error():
    from diffstill.html import _environment

    with pytest.raises(UndefinedError):
        _environment().from_string("{{ nothing }}").render()
