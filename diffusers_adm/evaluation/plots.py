"""Plots of metrics, and of the terms of the variational bound."""

from pathlib import Path

from matplotlib import colormaps
from matplotlib.figure import Figure

from diffusers_adm.atomic_files import atomic_write


Line = tuple[list[float], list[float]]


MARKERS = "osD^vPX*<>p"  # 11 markers, because 11 is coprime to the numbers of colours, so that pairs repeat late
FEW_POINTS = 30


def save_lines(
    path: Path, panels: list[tuple[str, str, dict[str, Line]]], log_scale: bool = False, top: float | None = None
) -> None:
    """
    Draws panels in rows of three, with one legend below all panels.

    Args:
        path: Path of the PNG file.
        panels: Label of the vertical axis, label of the horizontal axis, and lines by their names, per panel. All panels have the
            same names.
        log_scale: Whether the vertical axes are logarithmic.
        top: Upper end of the vertical axes.
    """
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    names = list(panels[0][2])
    legend_columns = 3 if columns > 1 else 2
    legend_height = 0.22 * -(-len(names) // legend_columns) if any(names) else 0
    width, height = (4.2 * columns, 3.4 * rows) if columns > 1 else (7.0, 4.5)
    figure = Figure(figsize=(width, height + legend_height), layout="constrained")
    colours = colormaps["tab10" if len(names) <= 10 else "tab20"]
    for position, (vertical, horizontal, lines) in enumerate(panels):
        axes = figure.add_subplot(rows, columns, position + 1)
        for number, name in enumerate(names):
            x, y = lines[name]
            marker = MARKERS[number % len(MARKERS)] if len(x) <= FEW_POINTS else None
            axes.plot(x, y, marker=marker, markersize=5, color=colours(number % colours.N), label=name)
        axes.set_xlabel(horizontal)
        axes.set_ylabel(vertical)
        axes.grid(alpha=0.3)
        if log_scale:
            axes.set_yscale("log")
        axes.set_ylim(top=top)
    if any(names):
        handles, labels = axes.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=legend_columns, fontsize="small")
    with atomic_write(path) as partial:
        figure.savefig(partial, dpi=150, format="png")
