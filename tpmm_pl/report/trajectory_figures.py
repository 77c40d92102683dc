"""Figures of over-optimisation and of the coefficients of merges."""

from __future__ import annotations

from collections.abc import Sequence
from math import isnan, nan
from statistics import fmean

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tpmm_pl.report.arms import Arm
from tpmm_pl.report.curves import (
    OverOptimisation,
    distances,
    domains_of,
    fit_over_optimisation,
)
from tpmm_pl.report.drawing import Drawing, legend, panels, style

_COLUMNS = 3
_NUMBERED = 12
"""Up to so many snapshots, cells hold their numbers."""

Fits = dict[str, dict[str, OverOptimisation]]
"""By metric and arm."""


def fits_of(arms: Sequence[Arm]) -> Fits:
    """Fit gold and proxy against the distance to the start, for every arm and domain."""
    found: Fits = {}
    for domain in domains_of(run for arm in arms for run in arm.runs):
        for metric in (f"gold/{domain}", f"proxy/{domain}"):
            for arm in arms:
                starts = [m[metric] for m in (run.metrics(0) for run in arm.runs) if metric in m]
                points = distances(arm.runs, metric)
                fit = fit_over_optimisation(points, fmean(starts)) if starts else None
                if fit is not None:
                    found.setdefault(metric, {})[arm.name] = fit
    return found


def distance_drawing(arms: Sequence[Arm], fits: Fits) -> Drawing | None:
    """Return gold and proxy of every policy against its distance to the start, with fits."""
    domains = domains_of(run for arm in arms for run in arm.runs)
    wanted = [[f"{judge}/{domain}" for judge in ("gold", "proxy")] for domain in domains]
    rows = [row for row in wanted if any(distances(arm.runs, m) for arm in arms for m in row)]
    if not rows:
        return None
    figure, grid = panels(len(rows), 2)
    for panel_row, row in zip(grid, rows, strict=True):
        for axes, metric in zip(panel_row, row, strict=True):
            for index, arm in enumerate(arms):
                fit = fits.get(metric, {}).get(arm.name)
                _scatter(axes, distances(arm.runs, metric), fit, index, arm.name)
            judge, _, domain = metric.partition("/")
            axes.set_ylabel(f"{judge} score, {domain.replace('_', ' ')}")
    for axes in grid[-1]:
        axes.set_xlabel("distance to the start, √KL in √nats")
    legend(figure)
    says = (
        "Every policy of every round and seed, and the curve R(d) = R(0) + d (a - b log d) of Gao"
        " et al. (2022) through the start, by least squares; the table below has a and b."
    )
    return Drawing("over_optimisation", "Over-optimisation", says, figure)


def coefficient_drawings(arms: Sequence[Arm]) -> list[Drawing]:
    """Return heat maps of coefficients, rounds by snapshots, and groups by snapshots."""
    merging = [arm for arm in arms if _merges(arm)]
    if not merging:
        return []
    single = [arm.name for arm in arms if arm not in merging]
    figure, axes = _tiles(len(merging))
    bounds = _bounds([row for arm in merging for row in _mean_coefficients(arm).values()])
    for place, arm in zip(axes, merging, strict=True):
        rows = _mean_coefficients(arm)
        _map(figure, place, list(rows.values()), list(map(str, rows)), bounds)
        place.set_title(arm.name, loc="left")
        place.set_ylabel("made after round")
    says = (
        "Which snapshots the reference of the next round is made of; a row sums to 1. Means over"
        " seeds, and over groups of parameters where they have coefficients of their own."
    )
    if single:
        says += f" Not shown, because their references are one snapshot each: {', '.join(single)}."
    drawings = [Drawing("coefficients", "Coefficients of the reference", says, figure)]
    grouped = [arm for arm in merging if len(_last_recipe(arm)[1]) > 1]
    return [*drawings, *(_group_drawing(arm, n) for n, arm in enumerate(grouped))]


def _group_drawing(arm: Arm, number: int) -> Drawing:
    rows, groups = _last_recipe(arm)
    figure, ((axes,),) = panels(1, 1, width=8.8, height=max(2.4, 0.24 * len(groups) + 1), top=0)
    _map(figure, axes, rows, groups, _bounds(rows))
    axes.set_ylabel("group of parameters")
    says = "The last reference: every group of parameters has its own row. Means over seeds."
    title = f"Coefficients by group, {arm.name}"
    return Drawing(f"coefficients_by_group_{number}", title, says, figure)


def _scatter(
    axes: Axes,
    points: Sequence[tuple[float, float]],
    fit: OverOptimisation | None,
    index: int,
    label: str,
) -> None:
    if not points:
        return
    line = style(index)
    axes.plot(*zip(*points, strict=True), line.marker, color=line.colour, alpha=0.55)
    places = np.linspace(0, fit.furthest, 100).tolist() if fit else []
    curve = [fit(d) for d in places] if fit else []
    axes.plot(places, curve, line.line, color=line.colour)
    axes.plot([], [], line.line, color=line.colour, marker=line.marker, label=label)


def _tiles(count: int) -> tuple[Figure, list[Axes]]:
    columns = min(count, _COLUMNS)
    figure, grid = panels(-(-count // columns), columns, width=8.8 / columns, height=3.0, top=0)
    axes = [one for row in grid for one in row]
    for empty in axes[count:]:
        empty.remove()
    return figure, axes[:count]


def _merges(arm: Arm) -> bool:
    recipes = [record.recipe for run in arm.runs for record in run.records]
    return any(recipe is not None and len(recipe.snapshots) > 1 for recipe in recipes)


def _mean_coefficients(arm: Arm) -> dict[int, list[float]]:
    """Return a row a round, with a column a snapshot; NaN for snapshots that are not in it."""
    found: dict[int, list[list[float]]] = {}
    for run in arm.runs:
        for record in run.records:
            if record.recipe is not None:
                means = np.mean(record.recipe.coefficients, axis=0).tolist()
                by_round = dict(zip(record.recipe.snapshots, means, strict=True))
                row = [by_round.get(index, nan) for index in range(arm.reached + 1)]
                found.setdefault(record.round, []).append(row)
    return {index: np.mean(rows, axis=0).tolist() for index, rows in sorted(found.items())}


def _last_recipe(arm: Arm) -> tuple[list[list[float]], list[str]]:
    """Return the coefficients of the last reference, groups by snapshots, and the groups."""
    recipes = [r.recipe for run in arm.runs for r in run.records if r.recipe is not None]
    widest = max(recipes, key=lambda recipe: max(recipe.snapshots))
    alike = [r for r in recipes if (r.snapshots, r.groups) == (widest.snapshots, widest.groups)]
    rows = np.mean([recipe.coefficients for recipe in alike], axis=0)
    placed = np.full((len(rows), arm.reached + 1), nan)
    placed[:, list(widest.snapshots)] = rows
    return placed.tolist(), list(widest.groups)


def _bounds(rows: Sequence[Sequence[float]]) -> tuple[float, float]:
    return min(0.0, float(np.nanmin(rows))), float(np.nanmax(rows))


def _map(
    figure: Figure,
    axes: Axes,
    rows: Sequence[Sequence[float]],
    names: Sequence[str],
    bounds: tuple[float, float],
) -> None:
    # a cell a path, not an image: sharp in print, and the page needs no picture
    mesh = axes.pcolormesh(
        np.ma.masked_invalid(rows), cmap="cividis", vmin=bounds[0], vmax=bounds[1], linewidth=0
    )
    wide = len(rows[0])
    axes.set_xticks([k + 0.5 for k in range(wide)], [str(k) for k in range(wide)])
    axes.set_yticks([k + 0.5 for k in range(len(rows))], names)
    axes.invert_yaxis()
    axes.grid(False)
    axes.tick_params(length=0)
    axes.set_xlabel("snapshot of round")
    if wide > _NUMBERED:
        figure.colorbar(mesh, ax=axes, label="coefficient")
        return
    middle = (bounds[0] + bounds[1]) / 2
    for y, row in enumerate(rows):
        for x, value in enumerate(row):
            if not isnan(value):
                text = f"{value:z.2f}".replace("0.", ".", 1)
                colour = "#000000" if value > middle else "#ffffff"
                axes.text(x + 0.5, y + 0.5, text, ha="center", va="center", color=colour, size=7)
