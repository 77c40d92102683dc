"""Arms of an experiment: the runs of one configuration, one a seed."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tpmm_pl.report.runs import STRATEGY, Run

_SHOWN = 3
"""Differing settings in the name of an arm."""
_LONGEST = 28


@dataclass(frozen=True)
class Arm:
    """Runs whose configurations differ only in the seed, and the name they share."""

    name: str
    runs: tuple[Run, ...]

    @property
    def seeds(self) -> list[int]:
        """The seeds, ascending; a run without a configuration has none."""
        return sorted(run.seed for run in self.runs if run.seed is not None)

    @property
    def reached(self) -> int:
        """The last round that any of the runs has."""
        return max(run.reached for run in self.runs)


def arms_of(runs: Sequence[Run]) -> list[Arm]:
    """Group runs by all of their configuration but the seed, in the order they come in.

    A second run of one configuration and seed opens another arm: it is no further seed. An arm is
    named by the strategy of its reference, and by settings that are not those of most runs.
    """
    groups: dict[tuple[str, int], list[Run]] = {}
    repeats: Counter[tuple[str, int | None]] = Counter()
    for run in runs:
        groups.setdefault((run.identity, repeats[run.identity, run.seed]), []).append(run)
        repeats[run.identity, run.seed] += 1
    names = _names([members[0] for members in groups.values()])
    return [Arm(name, tuple(g)) for name, g in zip(names, groups.values(), strict=True)]


def differences(arms: Sequence[Arm]) -> dict[str, list[str]]:
    """Return the settings that differ between arms, with each arm's value as JSON."""
    return {
        name: [json.dumps(value, ensure_ascii=False) for value in values]
        for name, values in _differing([arm.runs[0] for arm in arms]).items()
    }


def baseline(arms: Sequence[Arm]) -> Arm:
    """Return what the others are compared with: iterative DPO if it is there, else the first."""
    return next((arm for arm in arms if arm.name == "last"), arms[0])


def _names(runs: Sequence[Run]) -> list[str]:
    differing = {k: v for k, v in _differing(runs).items() if k != STRATEGY}
    usual = {k: Counter(map(_short, values)).most_common(1)[0][0] for k, values in differing.items()}
    found: list[str] = []
    for index, run in enumerate(runs):
        values = {k.rpartition(".")[2]: _short(v[index]) for k, v in differing.items()
                  if _short(v[index]) != usual[k]}  # fmt: skip
        said = [f"{key.replace('_', ' ')} {value}" for key, value in values.items()]
        more = [f"{len(said) - _SHOWN} more"] if len(said) > _SHOWN else []
        name = ", ".join([_strategy(run), *said[:_SHOWN], *more])
        taken = sum(one == name or one.startswith(f"{name} (") for one in found)
        found.append(f"{name} ({taken + 1})" if taken else name)
    return found


def _strategy(run: Run) -> str:
    if not run.config:
        return run.path.resolve().name
    strategy = run.settings.get(STRATEGY)
    recipes = [record.recipe.strategy for record in run.records if record.recipe]
    return str(strategy or next(iter(recipes), run.path.name))


def _differing(runs: Sequence[Run]) -> dict[str, list[Any]]:
    known = [run for run in runs if run.config]
    names = dict.fromkeys(name for run in known for name in run.settings)
    found = {name: [run.settings.get(name) for run in runs] for name in names}
    return {
        name: values
        for name, values in found.items()
        if len({json.dumps(run.settings.get(name), sort_keys=True) for run in known}) > 1
    }


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    # the end of a path or of a class tells more than its beginning
    text = text.rpartition(".")[2] if text.startswith("tpmm_pl.") else text
    return text if len(text) <= _LONGEST else f"…{text[1 - _LONGEST:]}"
