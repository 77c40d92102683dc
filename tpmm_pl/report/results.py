"""The table of results and the comparison of arms, for a page and for a README."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from math import sqrt
from statistics import fmean, stdev
from typing import NamedTuple

import torch

from tpmm_pl.report.arms import Arm, baseline
from tpmm_pl.report.curves import interval
from tpmm_pl.report.runs import Run
from tpmm_pl.stats import Estimate, win_rate
from tpmm_pl.types import InputError

_COLUMNS = {
    "gold/in_domain": ("gold in domain", 3),
    "gold/out_of_domain": ("gold out of domain", 3),
    "greedy/gold/in_domain": ("gold greedy", 3),
    "proxy/in_domain": ("proxy in domain", 3),
    "kl/policy_sft/in_domain": ("KL to start, nats", 2),
    "win/sft/in_domain": ("win rate to start", 2),
    "accuracy/in_domain": ("accuracy", 3),
    "length/in_domain": ("length, tokens", 1),
}


class Row(NamedTuple):
    """What an arm shipped, measured."""

    arm: str
    what: str
    """``start``, ``last`` (the policy after the last round), ``best`` (the round exported as the
    best), or a merge: ``merge`` (the last reference), ``average``, ``learned``."""
    values: dict[str, list[float]]
    """Of each run, by metric."""
    alone: dict[str, Estimate]
    """The intervals of the one run where there is one."""

    def cell(self, metric: str) -> str:
        """Return mean and standard deviation over runs, or a single run's value and interval."""
        digits = _COLUMNS[metric][1]
        found = self.values.get(metric, [])
        if not found:
            return ""
        if len(found) > 1:
            return f"{fmean(found):z.{digits}f} ± {stdev(found):.{digits}f}"
        low, high = self.alone[metric][1:] if metric in self.alone else (found[0], found[0])
        shown = f" [{low:z.{digits}f}, {high:z.{digits}f}]" if low < high else ""
        return f"{found[0]:z.{digits}f}{shown}"


class Comparison(NamedTuple):
    """An arm's last policies against those of the baseline, seed by seed and answer by answer."""

    arm: str
    against: str
    judge: str
    domain: str
    round: int
    """The last one that all runs of both arms have."""
    differences: list[float]
    """Of the mean scores, one a shared seed."""
    wins: Estimate | None
    """Win rate over all answers to the same prompts of shared seeds; ``None`` without scores."""

    @property
    def t(self) -> float | None:
        """Of the paired differences; ``None`` for fewer than two, or without spread."""
        spread = stdev(self.differences) if len(self.differences) > 1 else 0.0
        return fmean(self.differences) * sqrt(len(self.differences)) / spread if spread else None

    def cells(self) -> list[str]:
        """Return what a table shows, in the order of :data:`COMPARED`."""
        better = sum(one > 0 for one in self.differences)
        wins = "" if self.wins is None else "{:.2f} [{:.2f}, {:.2f}]".format(*self.wins)
        return [
            f"{self.arm} against {self.against}",
            self.domain.replace("_", " "),
            f"{fmean(self.differences):+.3f}",
            "" if self.t is None else f"{self.t:.1f}",
            f"{better} of {len(self.differences)}",
            wins,
        ]


COMPARED = ("last policies", "domain", "difference", "t", "seeds better", "win rate, answers")


def rows(arms: Sequence[Arm]) -> list[Row]:
    """Return what every arm shipped; a start that several arms share has one row."""
    found: list[Row] = []
    for arm in arms:
        by_name = [_measured(run) for run in arm.runs]
        for what in dict.fromkeys(name for shipped in by_name for name in shipped):
            shipped = [one.get(what, {}) for one in by_name]
            values = {m: [one[m] for one in shipped if m in one] for m in _COLUMNS}
            row = Row(arm.name, what, {m: v for m, v in values.items() if v}, _alone(arm, what))
            known = [one.values for one in found if one.what == what == "start"]
            if row.values and row.values not in known:
                found.append(row)
    return found


def columns(found: Sequence[Row]) -> dict[str, str]:
    """Return the titles of the metrics that any row has."""
    return {m: title for m, (title, _) in _COLUMNS.items() if any(m in r.values for r in found)}


def comparisons(arms: Sequence[Arm]) -> list[Comparison]:
    """Compare the last policies of every arm with the baseline's, on the seeds they share."""
    base = baseline(arms)
    found = [
        _compare(arm, base, domain)
        for arm in arms
        if arm is not base
        for domain in ("in_domain", "out_of_domain")
    ]
    return [one for one in found if one is not None]


def markdown(arms: Sequence[Arm]) -> str:
    """Return the tables of results and of comparisons for a README."""
    found, compared = rows(arms), comparisons(arms)
    titles = columns(found)
    lines = [["arm", "what", *titles.values()]]
    lines += [[row.arm, row.what, *map(row.cell, titles)] for row in found]
    tables = [_table(lines)]
    if compared:
        tables.append(_table([list(COMPARED), *(one.cells() for one in compared)]))
    return "\n\n".join(tables) + "\n"


def _measured(run: Run) -> dict[str, Mapping[str, float]]:
    final = run.metrics(run.reached)
    found = {"start": run.metrics(0), "last": final}
    if (best := _best(run)) is not None:
        found["best"] = run.metrics(best)
    names = {name.split("/")[1] for name in final if name.startswith("ship/")} - {"last"}
    order = ("merge", "average", "learned")
    for name in sorted(names, key=lambda name: (order.index(name) if name in order else 3, name)):
        found[name] = _stripped(final, f"ship/{name}/sampled/")
    if "merge" not in found and (merge := _stripped(final, "merge/")):
        found["merge"] = merge
    for name, metrics in found.items():
        greedy = _stripped(final, f"ship/{name}/greedy/")
        found[name] = {**metrics, **{f"greedy/{metric}": v for metric, v in greedy.items()}}
    return found


def _stripped(metrics: Mapping[str, float], prefix: str) -> dict[str, float]:
    return {n.removeprefix(prefix): v for n, v in metrics.items() if n.startswith(prefix)}


def _best(run: Run) -> int | None:
    file = run.path / "export" / "best" / "recipe.json"
    if not file.is_file():
        return None
    try:
        snapshots = json.loads(file.read_text(encoding="utf-8"))["snapshots"]
        return int(snapshots[-1])
    except (ValueError, LookupError, TypeError) as error:
        raise InputError(f"{file} cannot be read ({error!r}); export the run again") from error


def _alone(arm: Arm, what: str) -> dict[str, Estimate]:
    if len(arm.runs) > 1 or what not in ("start", "last", "best"):
        return {}
    run = arm.runs[0]
    index = {"start": 0, "last": run.reached, "best": _best(run) or 0}[what]
    return {m: interval(run, index, m) for m in _COLUMNS if m in run.metrics(index)}


def _compare(arm: Arm, base: Arm, domain: str) -> Comparison | None:
    by_seed = {run.seed: run for run in base.runs}
    pairs = [(run, by_seed[run.seed]) for run in arm.runs if run.seed in by_seed]
    if not pairs:
        return None
    last = min(run.reached for pair in pairs for run in pair)
    judges = (f"{judge}/{domain}" for judge in ("gold", "proxy"))
    measured = [m for m in judges if all(m in r.metrics(last) for pair in pairs for r in pair)]
    if not measured:
        return None
    metric = measured[0]
    gains = [ours.metrics(last)[metric] - theirs.metrics(last)[metric] for ours, theirs in pairs]
    judge = metric.partition("/")[0]
    wins = _wins(pairs, last, domain, judge)
    return Comparison(arm.name, base.name, judge, domain, last, gains, wins)


def _wins(pairs: Sequence[tuple[Run, Run]], last: int, domain: str, judge: str) -> Estimate | None:
    scores = [[run.scores(last).get(domain, {}).get(judge, []) for run in pair] for pair in pairs]
    if not all(ours and len(ours) == len(theirs) for ours, theirs in scores):
        return None
    ours, theirs = ([s for pair in scores for s in pair[side]] for side in (0, 1))
    generator = torch.Generator().manual_seed(0)
    return win_rate(torch.tensor(ours), torch.tensor(theirs), generator=generator)


def _table(lines: Sequence[Sequence[str]]) -> str:
    named = [[cell.replace("|", "\\|").replace("\n", " ") for cell in line] for line in lines]
    named.insert(1, ["---"] * len(named[0]))
    return "\n".join(f"| {' | '.join(line)} |" for line in named)
