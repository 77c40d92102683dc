"""How figures look, and the files and page parts they become."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from html import escape
from io import StringIO
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib import rc_context
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

INK = "#24292f"
"""Of text and axes; a page shows it in the colour of its own text."""

# of middle lightness, for white and black pages; in grey, lines and markers tell arms apart
_COLOURS = ("#2f7fc1", "#cf5c36", "#2a9d6f", "#a463b0", "#b08a1e", "#7b8794", "#c2548c")
_STYLES = ("-", "--", "-.", ":")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "<")


class Style(NamedTuple):
    """How one arm is drawn in all figures."""

    colour: str
    line: str
    marker: str


class Drawing(NamedTuple):
    """A figure with the words around it."""

    name: str
    """Of its files."""
    title: str
    caption: str
    figure: Figure


def style(index: int) -> Style:
    """Return the style of an arm by its number."""
    return Style(
        _COLOURS[index % len(_COLOURS)],
        _STYLES[index % len(_STYLES)],
        _MARKERS[index % len(_MARKERS)],
    )


@contextmanager
def drawing_style() -> Iterator[None]:
    """Within it, figures are made in the report's style, and the same ones byte for byte."""
    settings: dict[Any, Any] = {
        "axes.edgecolor": INK,
        "axes.grid": True,
        "axes.labelcolor": INK,
        "axes.spines.right": False,
        "axes.spines.top": False,
        "axes.titlesize": "medium",
        "figure.constrained_layout.w_pad": 0.1,
        "font.size": 10,
        "grid.alpha": 0.18,
        "grid.color": INK,
        "legend.frameon": False,
        "lines.linewidth": 1.6,
        "lines.markersize": 4,
        "svg.fonttype": "none",
        "svg.hashsalt": "tpmm",
        "text.color": INK,
        "text.parse_math": False,  # names come from folders and settings
        "xtick.color": INK,
        "ytick.color": INK,
    }
    with rc_context(settings):
        yield


def panels(
    rows: int, columns: int, *, width: float = 4.4, height: float = 2.7, top: float = 0.5
) -> tuple[Figure, list[list[Axes]]]:
    """Return a figure of equal panels, sizes in inches; ``top`` is left for a legend."""
    size = (max(width * columns, 5.2), height * rows + top)
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False).tolist()


def legend(figure: Figure) -> None:
    """Put one legend of all panels above them."""
    lines: dict[str, Artist] = {}
    for axes in figure.axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            lines.setdefault(label, handle)
    if lines:
        longest = max(map(len, lines))
        fitting = max(1, int(figure.get_figwidth() * 11 / (longest + 7)))
        figure.legend(
            lines.values(), lines.keys(), loc="outside upper left",
            ncols=min(len(lines), fitting), handlelength=3, borderaxespad=0.2,
        )  # fmt: skip


def save(drawing: Drawing, folder: Path) -> list[Path]:
    """Write a figure as PNG and SVG; return the files."""
    files = [folder / f"{drawing.name}.{kind}" for kind in ("png", "svg")]
    for file in files:
        dated = {"Date": None} if file.suffix == ".svg" else {}
        drawing.figure.savefig(file, dpi=150, facecolor="white", metadata=dated)
    return files


def inline(drawing: Drawing) -> str:
    """Return the figure as an ``svg`` element: its ink is the page's, its ids its own."""
    written = StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    drawing.figure.savefig(written, format="svg", transparent=True, metadata=nothing)
    text = written.getvalue()
    text = text[text.index("<svg") :].replace(INK, "currentColor")
    text = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", text, count=2)
    text = re.sub(r'(\bid="|\bhref="#|url\(#)', rf"\g<1>{drawing.name}-", text)
    label = f'<svg role="img" aria-label="{escape(drawing.title)}" '
    return text.replace("<svg ", label, 1)
