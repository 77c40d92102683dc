"""The numbers behind the figures: means and bands over seeds, over-optimisation."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import exp, log, sqrt
from statistics import fmean, stdev
from typing import NamedTuple

import torch

from tpmm_pl.report.runs import Run
from tpmm_pl.stats import Estimate

KL = "kl/policy_sft"
_Z = 1.959964
_AWAY = 1e-2
"""Square roots of nats; what is nearer is the start, but for rounding."""
_POINTS = 200
"""Of a curve over optimizer steps; longer ones are averaged in blocks."""


class Curve(NamedTuple):
    """A line with a band."""

    x: list[float]
    """Rounds or optimizer steps."""
    mean: list[float]
    low: list[float]
    high: list[float]


def domains_of(runs: Iterable[Run]) -> list[str]:
    """Return the domains that runs were evaluated on, ``in_domain`` first."""
    names = {name for run in runs for record in run.records for name in record.metrics}
    found = {name.rpartition("/")[2] for name in names if not name.startswith("ship/")}
    return sorted(found, key=lambda domain: (domain != "in_domain", domain))


def round_curve(runs: Sequence[Run], metric: str) -> Curve | None:
    """Return a metric over rounds.

    Args:
        runs: Of one arm.
        metric: With its domain, as ``gold/in_domain``.

    Returns:
        The mean over the runs that measured it in a round, in a band from the smallest to the
        largest of them; of a single run in its 95 % interval over prompts, where that is known.
        ``None`` where no run measured it.
    """
    known = {record.round for run in runs for record in run.records if metric in record.metrics}
    if not known:
        return None
    rounds = sorted(known)
    if len(runs) == 1:
        return _curve(rounds, [interval(runs[0], index, metric) for index in rounds])
    found = [[run.metrics(index).get(metric) for run in runs] for index in rounds]
    return _curve(rounds, [_span([v for v in values if v is not None]) for values in found])


def interval(run: Run, round_index: int, metric: str) -> Estimate:
    """Return a metric of a round with its 95 % interval over prompts, if that can be known."""
    metrics = run.metrics(round_index)
    value = metrics[metric]
    stem, _, domain = metric.rpartition("/")
    low, high, error = (f"{stem}_{end}/{domain}" for end in ("low", "high", "se"))
    if low in metrics and high in metrics:
        return Estimate(value, metrics[low], metrics[high])
    half = _Z * metrics[error] if error in metrics else _half(run, round_index, stem, domain)
    return Estimate(value, value - half, value + half)


def step_curve(series: Sequence[dict[int, float]]) -> Curve:
    """Return a logged value over optimizer steps, averaged over runs that logged the step.

    Args:
        series: One a run, by step; long ones are averaged in blocks of steps.
    """
    steps = sorted({step for values in series for step in values})
    size = -(-len(steps) // _POINTS)
    spans: list[Estimate] = []
    centres: list[float] = []
    for start in range(0, len(steps), size):
        block = steps[start : start + size]
        found = [[values[s] for s in block if s in values] for values in series]
        spans.append(_span([fmean(values) for values in found if values]))
        centres.append(fmean(block))
    return _curve(centres, spans)


class OverOptimisation(NamedTuple):
    r"""A score against the distance to the start (Gao et al. 2022, their form for RL).

    .. math:: R(d) = R_0 + d\,(\alpha - \beta \log d), \quad d = \sqrt{KL(\pi \| \pi_0)}
    """

    start: float
    """Score of the starting policy, which the curve goes through."""
    alpha: float
    beta: float
    r2: float
    """Share of the scores' variance that the curve explains."""
    nearest: float
    """Smallest distance among the points but the start's, in square roots of nats."""
    furthest: float

    def __call__(self, distance: float) -> float:
        """Return the score at a distance in square roots of nats."""
        if distance <= 0:
            return self.start
        return self.start + distance * (self.alpha - self.beta * log(distance))

    @property
    def peak(self) -> float | None:
        """The distance with the highest score; ``None`` if that is not among the points'."""
        if self.beta <= 0:
            return None
        peak = self.alpha / self.beta - 1
        return exp(peak) if log(self.nearest) <= peak <= log(self.furthest) else None


def distances(runs: Sequence[Run], metric: str) -> list[tuple[float, float]]:
    """Return distance to the start and score of every policy of an arm, start included.

    Args:
        runs: Of one arm.
        metric: With its domain; the divergence is measured on the same answers.

    Returns:
        Pairs ``(d, score)``, ``d`` in square roots of nats a sequence, sorted; an estimate of KL
        below 0 counts as 0.
    """
    divergence = f"{KL}/{metric.rpartition('/')[2]}"
    return sorted(
        (sqrt(max(record.metrics[divergence], 0.0)), record.metrics[metric])
        for run in runs
        for record in run.records
        if metric in record.metrics and divergence in record.metrics
    )


def fit_over_optimisation(
    points: Sequence[tuple[float, float]], start: float
) -> OverOptimisation | None:
    """Fit the curve of a score against distance by least squares.

    Args:
        points: Distance in square roots of nats, and score.
        start: Score at distance 0.

    Returns:
        The fit; ``None`` for fewer than three points away from the start, or if they do not differ
        in distance.
    """
    away = [(d, score) for d, score in points if d > _AWAY]
    if len(away) < 3 or away[0][0] == away[-1][0]:
        return None
    d, score = torch.tensor(away, dtype=torch.float64).unbind(-1)
    basis = torch.stack([d, -d * d.log()], -1)
    solution = torch.linalg.lstsq(basis, (score - start)[:, None], driver="gelsd").solution
    left = (score - start - (basis @ solution)[:, 0]).square().sum()
    total = (score - score.mean()).square().sum()
    r2 = float(1 - left / total) if total > 0 else 1.0
    alpha, beta = solution[:, 0].tolist()
    return OverOptimisation(start, alpha, beta, r2, float(d.min()), float(d.max()))


def _curve(x: Sequence[float], spans: Sequence[Estimate]) -> Curve:
    mean, low, high = (list(values) for values in zip(*spans, strict=True))
    return Curve([float(place) for place in x], mean, low, high)


def _span(values: Sequence[float]) -> Estimate:
    return Estimate(fmean(values), min(values), max(values))


def _half(run: Run, round_index: int, stem: str, domain: str) -> float:
    prefix, judge = ("merge/", stem[6:]) if stem.startswith("merge/") else ("", stem)
    scores = run.scores(round_index).get(f"{prefix}{domain}", {}).get(judge, [])
    return _Z * stdev(scores) / sqrt(len(scores)) if len(scores) > 1 else 0.0
