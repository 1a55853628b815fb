"""Line charts as SVG, which fit screens of every width and both colour schemes, and which screen readers can read."""

from html import escape
from xml.etree.ElementTree import Element, SubElement, tostring


Point = tuple[float, float]

WIDTH, HEIGHT = 360, 210
LEFT, RIGHT, TOP, BOTTOM = 34, 8, 8, 32
PLOT_WIDTH, PLOT_HEIGHT = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM
Y_TICKS = 4
FEW_POINTS = 12  # lines with at most so many points get markers
COLOURS = (
    "#1f77b4",
    "#ff7f0e",
    "#2ca02c",
    "#d62728",
    "#9467bd",
    "#8c564b",
    "#e377c2",
    "#7f7f7f",
    "#bcbd22",
    "#17becf",
)
CHART_CSS = """
.chart svg { width: 100%; max-width: 44rem; touch-action: pan-y; user-select: none; }
.chart figcaption { display: flex; flex-wrap: wrap; gap: 0.25rem 1rem; font-size: 0.9rem; }
"""


def line_chart(
    title: str,
    lines: dict[str, list[Point]],
    x_label: str,
    x_ticks: list[tuple[float, str]],
    x_range: tuple[float, float],
    y_top: float = 1.0,
    emphasised: str | None = None,
    shaded: tuple[float, float] | None = None,
    marked: float | None = None,
) -> str:
    """
    Draws a line chart whose vertical axis begins at 0.

    Args:
        title: Heading of the chart, which screen readers read.
        lines: Points `(x, y)` of each line, by its name.
        x_label: Name of the horizontal axis.
        x_ticks: Places on the horizontal axis, and their texts.
        x_range: Ends of the horizontal axis.
        y_top: Upper end of the vertical axis.
        emphasised: Name of the line that is drawn thicker.
        shaded: Interval of the horizontal axis that is shaded.
        marked: Place on the horizontal axis that is marked by a vertical line.

    Returns:
        HTML, in which names and texts are escaped.
    """

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - x_range[0]) / ((x_range[1] - x_range[0]) or 1)
        return round(LEFT + PLOT_WIDTH * across, 1), round(TOP + PLOT_HEIGHT * (1 - y / (y_top or 1)), 1)

    svg = Element("svg", viewBox=f"0 0 {WIDTH} {HEIGHT}", role="img", fill="currentColor")
    svg.attrib |= {"aria-label": title, "font-size": "10"}
    first, last = (place(x, 0)[0] for x in shaded or (x_range[0], x_range[0]))
    add_rect(svg, first, last - first, "shaded", "#1f77b4", "0.2")
    add_rect(svg, LEFT, PLOT_WIDTH, "plot", "currentColor", "0.04")
    for tick in range(Y_TICKS + 1):
        x, y = place(x_range[0], y_top * tick / Y_TICKS)
        add_line(svg, [(x, y), (LEFT + PLOT_WIDTH, y)], "currentColor", "0.3", opacity="0.3")
        add_text(svg, x - 4, y + 3, f"{y_top * tick / Y_TICKS:.3g}", "end")
    for x, text in x_ticks:
        add_text(svg, place(x, 0)[0], HEIGHT - BOTTOM + 12, text, "middle")
    add_text(svg, LEFT + PLOT_WIDTH / 2, HEIGHT - 5, x_label, "middle")
    if marked is not None:
        add_line(svg, [place(marked, 0), place(marked, y_top)], "currentColor", "1", **{"stroke-dasharray": "3 3"})
    for colour, (name, points) in zip(line_colours(len(lines)), lines.items()):
        places = [place(*point) for point in points]
        width = "3" if name == emphasised else "1.5"
        SubElement(add_line(svg, places, colour, width), "title").text = name
        for x, y in places if len(places) <= FEW_POINTS else ():
            SubElement(svg, "circle", cx=f"{x}", cy=f"{y}", r="3", fill=colour)
    legend = "".join(
        f'<span><b style="color: {colour}" aria-hidden="true">━</b> {escape(name)}</span>'
        for colour, name in zip(line_colours(len(lines)), lines)
        if len(lines) > 1
    )
    heading = f"<strong>{escape(title)}</strong>"
    return f'<figure class="chart">{heading}{tostring(svg, "unicode")}<figcaption>{legend}</figcaption></figure>'


def line_colours(count: int) -> list[str]:
    """Returns a colour per line. They repeat after ten lines."""
    return [COLOURS[number % len(COLOURS)] for number in range(count)]


def add_rect(svg: Element, x: float, width: float, name: str, colour: str, opacity: str) -> None:
    """Adds a rectangle of the height of the plot."""
    place = {"x": f"{x}", "y": f"{TOP}", "width": f"{width}", "height": f"{PLOT_HEIGHT}"}
    SubElement(svg, "rect", {**place, "class": name, "fill": colour, "opacity": opacity})


def add_line(svg: Element, places: list[tuple[float, float]], colour: str, width: str, **style: str) -> Element:
    """Adds a line through places in the picture, and returns it."""
    points = " ".join(f"{x},{y}" for x, y in places)
    return SubElement(
        svg, "polyline", {"points": points, "fill": "none", "stroke": colour, "stroke-width": width, **style}
    )


def add_text(svg: Element, x: float, y: float, text: str, anchor: str) -> None:
    """Adds a text."""
    SubElement(svg, "text", {"x": f"{x}", "y": f"{y}", "text-anchor": anchor}).text = text
