"""Charts and pages: where points are drawn, and that what is shown is escaped and described."""

import base64
import io
import re
import xml.etree.ElementTree as ET

import numpy as np
import pytest
from pages import check_page
from PIL import Image

from tinymim_jax.pages.charts import Series, heat_map, interval, line_chart, stacked_bar, standalone
from tinymim_jax.pages.colours import coloured, data_uri, viridis
from tinymim_jax.pages.page import Raw, figure, number, page, picture, table

NAN = float("nan")


def points_of(svg: str) -> list[list[tuple[float, float]]]:
    """Corners of each line of a chart, split at its gaps."""
    found = []
    for path in re.findall(r'<path class="line[^"]*" d="([^"]*)"', svg):
        for part in path.split("M")[1:]:
            numbers = [float(n) for n in re.split(r"[L ]", part)]
            found.append(list(zip(numbers[::2], numbers[1::2])))
    return found


def test_points_lie_where_their_values_are():
    """x and y are affine in the value: the ends of the x axis are the ends of the frame, equal steps are equal."""
    svg = line_chart("loss", [Series("loss", [10, 20, 40], [1.0, 2.0, 4.0])])
    ((first, second, third),) = points_of(svg)
    assert (first[0], third[0]) == (52.0, 410.0)
    np.testing.assert_allclose((second[0] - first[0]) / (third[0] - first[0]), 1 / 3, atol=1e-3)
    np.testing.assert_allclose((first[1] - second[1]) / (first[1] - third[1]), 1 / 3, atol=1e-3)
    assert third[1] < second[1] < first[1]  # up
    ticks = [float(label) for label in re.findall(r'text-anchor="end">([^<]*)<', svg)]
    assert ticks == sorted(ticks)
    assert ticks[0] <= 1.0
    assert ticks[-1] >= 4.0


@pytest.mark.parametrize(
    ("last", "ticks"), [(12, ["3", "6", "9", "12"]), (3, ["1", "2", "3"]), (2500, ["500", "1000"])]
)
def test_steps_and_blocks_are_counted_in_whole_numbers(last, ticks):
    svg = line_chart("CKA", [Series("teacher", [1, last], [0.0, 1.0])], x_label="block")
    below = re.findall(r'<text x="[\d.]+" y="229.0" text-anchor="middle">([^<]*)', svg)
    assert below[: len(ticks)] == ticks
    assert all(float(text).is_integer() for text in below)


def test_a_logarithmic_axis():
    values = [1.0, 0.1, 0.01, 0.001]
    svg = line_chart("loss", [Series("loss", [1, 2, 3, 4], values)], log=True)
    (line,) = points_of(svg)
    steps = np.diff([y for _, y in line])
    np.testing.assert_allclose(steps, steps[0], atol=0.11)  # coordinates have one digit
    narrow = points_of(line_chart("loss", [Series("loss", [1, 2, 3, 4], [1.0, 0.5, 0.1, 0.05])], log=True))[0]
    steps = np.diff([y for _, y in narrow])
    np.testing.assert_allclose(steps[0] / steps[1], 0.5 / 0.4, rtol=0.02)  # a factor of 20 is drawn linearly


def test_gaps_single_points_and_nothing():
    svg = line_chart("loss", [Series("loss", [1, 2, 3, 4, 5], [1.0, 2.0, NAN, None, 3.0])])
    assert [len(part) for part in points_of(svg)] == [2, 1]
    assert svg.count("<circle") == 1  # the point without neighbours
    assert "2 values are not finite" in svg
    assert line_chart("loss", [Series("loss", [1, 2], [NAN, None])]) == ""
    assert line_chart("loss", []) == ""
    assert "<circle" in line_chart("loss", [Series("loss", [7], [0.0])])


def test_spikes_survive_thinning():
    values = np.ones(100_000)
    values[54_321], values[77_777] = 50.0, -3.0
    svg = line_chart("loss", [Series("loss", list(range(len(values))), list(values))])
    (line,) = points_of(svg)
    assert len(line) <= 800
    heights = np.array([y for _, y in line])
    assert (heights == heights.min()).sum() == 1
    assert (heights == heights.max()).sum() == 1
    assert len(svg) < 60_000


def test_heat_map_and_bars():
    matrix = np.array([[0.0, 0.5], [NAN, 1.0], [0.2, 0.3]])
    svg = heat_map("CKA", matrix, row_label="student", column_label="teacher", marked=[(2, 2)])
    cells = re.findall(r'<rect x="([\d.]+)" y="([\d.]+)"[^>]*fill="([^"]*)"><title>([^<]*)', svg)
    assert [cell[3] for cell in cells] == [
        "student 1, teacher 1: 0", "student 1, teacher 2: 0.5", "student 2, teacher 1: nan",
        "student 2, teacher 2: 1", "student 3, teacher 1: 0.2", "student 3, teacher 2: 0.3",
    ]  # fmt: skip
    assert (cells[0][2], cells[3][2], cells[2][2]) == ("#440154", "#fde725", "none")
    marked = re.search(r'class="marked" x="([\d.]+)" y="([\d.]+)"', svg)
    assert marked is not None
    assert marked.groups() == cells[3][:2]
    assert "the largest in row 2, column 2" in svg
    bar = stacked_bar("time", {"steps": 0.75, "input <>": 0.25})
    widths = [float(w) for w in re.findall(r'<rect class="fill[^"]*" x="[\d.]+" y="0" width="([\d.]+)"', bar)]
    np.testing.assert_allclose(widths, [750, 250])
    assert "input &lt;&gt; 25.0%" in bar
    mini = interval(0.5, 0.1, 0.0, 1.0, "top1 0.5")
    ends = re.search(r'class="line s0" x1="([\d.]+)" x2="([\d.]+)"', mini)
    assert ends is not None
    np.testing.assert_allclose([float(x) for x in ends.groups()], [6 + 148 * 0.4, 6 + 148 * 0.6], atol=0.06)


def test_a_picture_file_of_a_chart_is_xml_with_its_legend():
    series = [Series("student & co", [1, 2], [1.0, 2.0]), Series("teacher", [1, 2], [2.0, 1.0])]
    text = standalone(line_chart("k-NN", series, inside=True))
    root = ET.fromstring(text.encode())
    assert root.tag.endswith("svg")
    labels = [element.text for element in root.iter() if element.tag.endswith("text")]
    assert {"student & co", "teacher"} <= set(labels)


def test_colours_and_images():
    assert viridis(-1) == viridis(0) == "#440154"
    middle = [int(viridis(0.5)[i : i + 2], 16) for i in (1, 3, 5)]
    np.testing.assert_allclose(middle, (0x21, 0x91, 0x8C), atol=1)  # matplotlib's; ours is interpolated
    drawn = coloured(np.array([[0.0, 5.0]]))
    assert drawn[0, 0].tolist() == [0x44, 0x01, 0x54]
    assert drawn[0, 1].tolist() == [0xFD, 0xE7, 0x25]
    image = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)
    uri = data_uri(image)
    assert uri.startswith("data:image/png;base64,")
    back = np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1]))))
    np.testing.assert_array_equal(back, image)
    assert data_uri(np.zeros((64, 64, 3), np.uint8)).startswith("data:image/jpeg")


def test_text_is_escaped_and_empty_parts_are_left_out():
    evil = '<script>alert("x")</script>'
    body = table(["name", evil], [[evil, 1.0], [Raw("<b>bold</b>"), 12345]], caption=evil) + picture(
        data_uri(np.zeros((2, 2, 3), np.uint8)), evil + " picture", evil
    )
    text = page(
        evil,
        [
            ("Good", body),
            ("Empty", ""),
            ("Chart " + evil, figure("f", line_chart(evil, [Series(evil, [1, 2], [1, 2])]))),
        ],
    )
    parsed = check_page(text)
    assert len(parsed.all("script")) == 1  # ours
    assert parsed.all("b") == [{}]
    assert "Empty" not in text
    assert figure("nothing", "") == table(["a"], []) == ""


@pytest.mark.parametrize(
    ("value", "text"), [(None, "-"), (3, "3"), (12345, "12,345"), (0.123456, "0.1235"), (2048.0, "2,048"), ("x", "x")]
)
def test_numbers(value, text):
    assert number(value) == text
