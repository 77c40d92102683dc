"""The report as one page: everything in it is text, none of it markup, script or network."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from tpmm_pl.report import results
from tpmm_pl.report.arms import Arm, differences
from tpmm_pl.report.drawing import Drawing, drawing_style, inline, save
from tpmm_pl.report.environment import present_versions, recorded_versions
from tpmm_pl.report.round_figures import MARGINS, margins_drawing, round_drawings
from tpmm_pl.report.runs import notes
from tpmm_pl.report.samples import sample_rows
from tpmm_pl.report.scalars import read_scalars
from tpmm_pl.report.trajectory_figures import (
    Fits,
    coefficient_drawings,
    distance_drawing,
    fits_of,
)

_NOT_MEASURED = {
    "gold": "gold scores: no run has evaluation.gold",
    "proxy": "proxy scores: no run has evaluation.proxy",
    "kl": "KL to the start: no run samples answers at temperature 1 in its evaluation",
    "win": "win rates: no run has evaluation.gold or evaluation.proxy",
}


class Page(NamedTuple):
    """A report and what is in it."""

    html: str
    figures: list[Path]
    summary: dict[str, Any]
    """Plain JSON values."""


def build_page(arms: Sequence[Arm], title: str, figures: Path) -> Page:
    """Draw all figures, write them to a folder, and return the page that shows them.

    Args:
        arms: What is reported, in order.
        title: Of the page.
        figures: A folder; made, and files of the same names in it replaced.

    Raises:
        InputError: If a file of a run cannot be read.
    """
    runs = [run for arm in arms for run in arm.runs]
    fits = fits_of(arms)
    rows, compared = results.rows(arms), results.comparisons(arms)
    said = notes(runs)
    figures.mkdir(parents=True, exist_ok=True)
    with drawing_style():
        drawings = _drawings(arms, fits)
        files = [file for drawing in drawings for file in save(drawing, figures)]
        parts = [(drawing, Markup(inline(drawing))) for drawing in drawings]
    html = _template().render(
        title=title,
        arms=arms,
        runs=runs,
        notes=said,
        missing=_missing(arms),
        rows=rows,
        columns=results.columns(rows),
        comparisons=compared,
        compared=results.COMPARED,
        figures=parts,
        fits=fits,
        samples=sample_rows(arms),
        differences=differences(arms),
        configs=[(arm, yaml.safe_dump(arm.runs[0].config, sort_keys=False)) for arm in arms],
        recorded=recorded_versions(runs),
        present=present_versions(),
    )
    return Page(html, files, _summary(arms, rows, compared, fits, said))


def _drawings(arms: Sequence[Arm], fits: Fits) -> list[Drawing]:
    logged = {
        arm.name: [read_scalars(run.path / "tensorboard", list(MARGINS)) for run in arm.runs]
        for arm in arms
    }
    by_round = round_drawings(arms)
    others = [distance_drawing(arms, fits), margins_drawing(arms, logged)]
    found = [*by_round, *others, *coefficient_drawings(arms)]
    return [drawing for drawing in found if drawing is not None]


def _missing(arms: Sequence[Arm]) -> list[str]:
    names = {n for arm in arms for run in arm.runs for r in run.records for n in r.metrics}
    measured = {name.partition("/")[0] for name in names}
    return [text for area, text in _NOT_MEASURED.items() if area not in measured]


def _summary(
    arms: Sequence[Arm],
    rows: Sequence[results.Row],
    compared: Sequence[results.Comparison],
    fits: Fits,
    said: Sequence[str],
) -> dict[str, Any]:
    return {
        "arms": [
            {
                "name": arm.name,
                "runs": [str(run.path) for run in arm.runs],
                "seeds": arm.seeds,
                "rounds": arm.reached,
                "results": {row.what: row.values for row in rows if row.arm == arm.name},
                "over_optimisation": {
                    metric: by_arm[arm.name]._asdict()
                    for metric, by_arm in fits.items()
                    if arm.name in by_arm
                },
            }
            for arm in arms
        ],
        "comparisons": [{**one._asdict(), "t": one.t} for one in compared],
        "notes": list(said),
    }


def _template() -> Any:
    environment = Environment(
        loader=PackageLoader("tpmm_pl.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("page.html")
