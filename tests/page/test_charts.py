"""Charts are valid SVG, and their lines are at the places of their numbers."""

from xml.etree.ElementTree import Element, fromstring

import pytest

from diffusers_adm.page.charts import LEFT, PLOT_HEIGHT, PLOT_WIDTH, TOP, line_chart


pytestmark = pytest.mark.page


def chart(lines: dict, **options) -> Element:
    given = {"title": "Title", "x_label": "x", "x_ticks": [(0, "zero"), (2, "two")], "x_range": (0, 2)}
    return fromstring(line_chart(lines=lines, **{**given, **options}))


def test_points_lie_where_their_numbers_say():
    figure = chart({"line": [(0, 0), (1, 0.5), (2, 1)]}, shaded=(0.5, 1.5), emphasised="line")
    line = next(one for one in figure.iter("polyline") if one.find("title") is not None)
    assert line.find("title").text == "line" and line.get("stroke-width") == "3"
    places = [tuple(map(float, point.split(","))) for point in line.get("points").split()]
    bottom = TOP + PLOT_HEIGHT
    expected = [(LEFT, bottom), (LEFT + PLOT_WIDTH / 2, bottom - PLOT_HEIGHT / 2), (LEFT + PLOT_WIDTH, TOP)]
    assert places == [pytest.approx(place, abs=0.1) for place in expected]
    shaded = next(one for one in figure.iter("rect") if one.get("class") == "shaded")
    assert float(shaded.get("x")) == pytest.approx(LEFT + PLOT_WIDTH / 4, abs=0.1)
    assert float(shaded.get("width")) == pytest.approx(PLOT_WIDTH / 2, abs=0.2)


def test_names_of_a_model_are_shown_as_they_are():
    figure = chart({"<b>bold</b> & more": [(0, 1)], 'quote"': [(0, 0)]}, title="A <i> & b")
    assert figure.find("svg").get("aria-label") == "A <i> & b"
    assert [one.text for one in figure.iter("title")] == ["<b>bold</b> & more", 'quote"']
    assert [span.find("b").tail.strip() for span in figure.iter("span")] == ["<b>bold</b> & more", 'quote"']
    assert figure.find(".//i") is None


def test_a_chart_of_zeros_or_of_one_place_can_be_drawn():
    assert chart({"line": [(0, 0)]}, x_range=(0, 0), y_top=0.0).find("svg") is not None
