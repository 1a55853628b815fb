"""Plots of figures."""

from pathlib import Path

from matplotlib.figure import Figure

from diffusers_adm.evaluation.arrays import written_whole


Line = tuple[list[float], list[float]]


def save_lines(path: Path, panels: list[tuple[str, str, dict[str, Line]]], log_scale: bool = False) -> None:
    """
    Draws panels side by side, in rows of three.

    Args:
        path: Of the picture, PNG.
        panels: Of each: what is on its vertical axis, what on its horizontal one, and its lines by their names.
        log_scale: Of the vertical axes.
    """
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(4.2 * columns, 3.4 * rows), layout="constrained")
    for position, (vertical, horizontal, lines) in enumerate(panels):
        axes = figure.add_subplot(rows, columns, position + 1)
        for name, (x, y) in lines.items():
            axes.plot(x, y, marker="o" if len(x) <= 30 else None, markersize=4, label=name)
        axes.set_xlabel(horizontal)
        axes.set_ylabel(vertical)
        axes.grid(alpha=0.3)
        if log_scale:
            axes.set_yscale("log")
        if any(lines):
            axes.legend(fontsize="small")
    with written_whole(path) as partial:
        figure.savefig(partial, dpi=150, format="png")
