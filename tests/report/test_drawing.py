from __future__ import annotations

import re
from pathlib import Path
from xml.etree import ElementTree

from tests.report.written_runs import arms, config, drift, write_run
from tpmm_pl.report.drawing import INK, Drawing, drawing_style, inline, panels, save, style
from tpmm_pl.report.round_figures import round_drawings


def drawing(name: str = "figure", label: str = "a line") -> Drawing:
    figure, ((axes,),) = panels(1, 1)
    axes.plot([0, 1], [0, 1], label=label)
    axes.set_ylabel(label)
    return Drawing(name, f"Title of {label}", "says", figure)


def test_no_two_arms_look_alike_even_in_grey() -> None:
    styles = [style(n) for n in range(36)]
    assert len(set(styles)) == 36
    assert len({(one.line, one.marker) for one in styles}) == 36


def test_a_figure_is_written_as_png_and_svg_the_same_again(tmp_path: Path) -> None:
    written = []
    for _ in range(2):
        with drawing_style():
            files = save(drawing(), tmp_path)
        written.append([file.read_bytes() for file in files])
    assert [file.name for file in files] == ["figure.png", "figure.svg"]
    assert written[0] == written[1]
    assert written[0][0].startswith(b"\x89PNG")
    assert ElementTree.fromstring(written[0][1]).tag.endswith("svg")


def test_on_a_page_a_figure_has_the_colour_of_the_text_and_ids_of_its_own() -> None:
    with drawing_style():
        one, two = (inline(drawing(name)) for name in ("one", "two"))
    assert INK not in one
    assert "currentColor" in one
    assert "http" not in one
    ids = [set(re.findall(r'\bid="([^"]+)"', text)) for text in (one, two)]
    assert ids[0]
    assert not ids[0] & ids[1]
    used = set(re.findall(r'(?:href="#|url\(#)([^")]+)', one))
    assert used
    assert used <= ids[0]


def test_names_are_text_in_a_figure_and_no_mathematics() -> None:
    name = '<script>alert("1")</script> $\\frac$ & "'
    with drawing_style():
        text = inline(drawing(label=name))
    assert "<script" not in text
    assert "&lt;script&gt;" in text
    label = ElementTree.fromstring(text.replace("xlink:", "")).get("aria-label")
    assert label == f"Title of {name}"


def test_lines_of_a_figure_are_the_curves_of_the_arms(tmp_path: Path) -> None:
    found = arms(
        write_run(tmp_path / "a", config(0), drift(0.5, 0.2)),
        write_run(tmp_path / "b", config(1), drift(0.5, 0.4)),
        write_run(tmp_path / "c", config(0, "ema"), drift(0.5, 0.6)),
    )
    with drawing_style():
        drawings = {one.name: one for one in round_drawings(found)}
    assert list(drawings) == ["scores", "divergence", "wins", "accuracy", "length"]
    gold, proxy = drawings["scores"].figure.axes
    lines = {str(line.get_label()): list(line.get_ydata()) for line in gold.lines}  # type: ignore[arg-type]
    assert lines == {"last": [0.5, 0.30000000000000004], "ema": [0.5, 0.6]}
    assert (gold.get_ylabel(), proxy.get_ylabel()) == ("gold score", "proxy score")
    assert proxy.get_xlabel() == "round"
    assert drawings["length"].figure.axes[0].get_ylabel() == "length, tokens"
    assert len(gold.collections) == 1  # a band over the two seeds; the third run has no interval
