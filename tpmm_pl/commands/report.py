"""``tpmm report``: runs as one page, with figures beside it."""

from __future__ import annotations

from pathlib import Path

from tpmm_pl.commands.output import report
from tpmm_pl.files import refuse_unwritable, write_text
from tpmm_pl.report.arms import arms_of
from tpmm_pl.report.page import build_page
from tpmm_pl.report.results import markdown
from tpmm_pl.report.runs import read_runs
from tpmm_pl.types import InputError


def report_runs(
    runs: list[str],
    out: Path = Path("report.html"),
    figures: Path | None = None,
    table: Path | None = None,
    title: str | None = None,
    overwrite: bool = False,
    json: bool = False,
) -> None:
    """Write one self-contained page on runs of one task, and every figure as PNG and SVG.

    Runs whose configurations differ only in the seed are one arm.

    Args:
        runs: Run folders, finished or not, or folders of them.
        out: The page.
        figures: Folder of the figures; by default `report_files` beside a page `report.html`.
        table: Markdown file for the tables of results.
        title: Heading of the page.
        overwrite: Replace what is there.
        json: Print one JSON object and nothing else.

    Raises:
        InputError: If a folder holds no run, runs are of different tasks, or an output exists.
    """
    figures = figures or out.with_name(f"{out.stem}_files")
    for place in (out, figures, *([table] if table else [])):
        _refuse(place, overwrite=overwrite)
    arms = arms_of(read_runs([Path(run) for run in runs]))
    page = build_page(arms, title or f"Report: {', '.join(arm.name for arm in arms)}", figures)
    write_text(out, page.html)
    if table is not None:
        write_text(table, markdown(arms))
    written = {
        "out": str(out), "figures": [str(file) for file in page.figures],
        "table": None if table is None else str(table),
    }  # fmt: skip
    count = sum(len(arm.runs) for arm in arms)
    sentences = [
        f"{out}: {count} run{'s' if count > 1 else ''} in {len(arms)} arm"
        f"{'s' if len(arms) > 1 else ''}, {len(page.figures)} figure files in {figures}",
        *([f"{table}: the tables"] if table else []),
        *(f"note: {note}" for note in page.summary["notes"]),
    ]
    report("\n".join(sentences), written | page.summary, json=json)


def _refuse(place: Path, *, overwrite: bool) -> None:
    if place.exists() and not overwrite:
        raise InputError(f"{place} exists; choose another place, or replace it with --overwrite")
    refuse_unwritable(place.absolute().parent)
