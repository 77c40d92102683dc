from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from matplotlib.collections import QuadMesh

from tests.report.written_runs import arms, config, drift, gold, write_run
from tpmm_pl.report.arms import Arm
from tpmm_pl.report.drawing import Drawing, drawing_style
from tpmm_pl.report.trajectory_figures import coefficient_drawings, distance_drawing, fits_of
from tpmm_pl.types import Recipe


def cells(drawing: Drawing, panel: int = 0) -> list[list[float | None]]:
    axes = drawing.figure.axes[panel]
    (mesh,) = (one for one in axes.collections if isinstance(one, QuadMesh))
    return np.ma.asarray(mesh.get_array()).tolist()  # type: ignore[no-any-return]


def drawn(found: list[Arm]) -> list[Drawing]:
    with drawing_style():
        return coefficient_drawings(found)


def test_the_map_has_a_row_a_round_and_leaves_out_what_is_not_merged(tmp_path: Path) -> None:
    uniform = write_run(tmp_path / "a", config(0, "uniform"), gold(0.5, 0.4, 0.3))
    last = write_run(tmp_path / "b", config(0, "last"), gold(0.5, 0.4), strategy="last")
    (drawing,) = drawn(arms(uniform, last))
    third = pytest.approx(1 / 3)
    assert cells(drawing) == [[1, None, None], [0.5, 0.5, None], [third, third, third]]
    assert drawing.caption.endswith("one snapshot each: last.")
    assert drawn(arms(last)) == []


def test_coefficients_of_seeds_and_groups_are_averaged(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / str(n), config(n, "learned"), gold(0.5, 0.4)) for n in (0, 1)]
    found = arms(*folders)
    for run, first in zip(found[0].runs, (0.2, 0.6), strict=True):
        rows = ((first, 1 - first), (0.0, 1.0))
        run.store.update(1, recipe=Recipe("learned", (0, 1), rows, "layer", ("low", "high")))
    mean, by_group = drawn(found)
    assert cells(mean)[1] == pytest.approx([0.2, 0.8])
    assert cells(by_group) == [pytest.approx([0.4, 0.6]), [0.0, 1.0]]
    labels = [label.get_text() for label in by_group.figure.axes[0].get_yticklabels()]
    assert labels == ["low", "high"]


def test_many_snapshots_have_a_scale_in_place_of_numbers(tmp_path: Path) -> None:
    (drawing,) = drawn(arms(write_run(tmp_path / "a", config(), gold(*[0.5] * 13))))
    assert [axes.get_ylabel() for axes in drawing.figure.axes] == [
        "made after round",
        "coefficient",
    ]
    assert len(drawing.figure.axes[0].texts) == 0


def test_policies_are_drawn_against_their_distance_with_the_fit(tmp_path: Path) -> None:
    found = arms(write_run(tmp_path / "a", config(), drift(0.5, 0.4, 0.3, 0.2)))
    fits = fits_of(found)
    assert list(fits) == ["gold/in_domain", "proxy/in_domain"]
    with drawing_style():
        drawing = distance_drawing(found, fits)
    assert drawing is not None
    points, curve, _ = drawing.figure.axes[0].lines
    assert list(points.get_xdata()) == pytest.approx([0, 1, 2**0.5, 3**0.5])  # type: ignore[arg-type]
    assert list(points.get_ydata()) == [0.5, 0.4, 0.3, 0.2]  # type: ignore[arg-type]
    fit = fits["gold/in_domain"]["last"]
    assert list(curve.get_ydata()) == [fit(d) for d in curve.get_xdata()]  # type: ignore[arg-type, union-attr]
    assert curve.get_ydata()[0] == 0.5  # type: ignore[index]


def test_without_divergence_there_is_no_distance(tmp_path: Path) -> None:
    found = arms(write_run(tmp_path / "a", config(), gold(0.5, 0.4, 0.3, 0.2)))
    assert fits_of(found) == {}
    assert distance_drawing(found, {}) is None
