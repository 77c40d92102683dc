"""Arms of an experiment: the runs of one configuration, one a seed."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tpmm_pl.report.runs import STRATEGY, Run

_SHOWN = 3
"""Differing settings in the name of an arm."""
_LONGEST = 28
_SEED_FOLDER = re.compile(r"seed_\d+")


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
    named by its folder where runs are in ``ARM/seed_N``; else by the strategy of its reference and
    by settings that are not those of most arms.
    """
    groups: dict[tuple[str, int], list[Run]] = {}
    repeats: Counter[tuple[str, int | None]] = Counter()
    for run in runs:
        groups.setdefault((run.identity, repeats[run.identity, run.seed]), []).append(run)
        repeats[run.identity, run.seed] += 1
    names = _names(list(groups.values()))
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


def _names(groups: Sequence[Sequence[Run]]) -> list[str]:
    folders = [{run.path.resolve().parent.name for run in group} for group in groups]
    named = [next(iter(names)) for names in folders if len(names) == 1]
    seeded = all(_SEED_FOLDER.fullmatch(run.path.name) for group in groups for run in group)
    if seeded and len(set(named)) == len(groups):
        return named
    names: list[str] = []
    for name in _said([group[0] for group in groups]):
        taken = sum(one == name or one.startswith(f"{name} (") for one in names)
        names.append(f"{name} ({taken + 1})" if taken else name)
    return names


def _said(runs: Sequence[Run]) -> list[str]:
    differing = {k: v for k, v in _differing(runs).items() if k != STRATEGY}
    shown = {name: [_short(value) for value in values] for name, values in differing.items()}
    usual = {name: Counter(values).most_common(1)[0][0] for name, values in shown.items()}
    names = []
    for index, run in enumerate(runs):
        said = {_leaf(k, v[index]): None for k, v in shown.items()
                if v[index] not in (usual[k], "null") and run.config}  # fmt: skip
        more = [f"{len(said) - _SHOWN} more"] if len(said) > _SHOWN else []
        names.append(", ".join([_strategy(run), *list(said)[:_SHOWN], *more]))
    return names


def _leaf(name: str, value: str) -> str:
    *_, owner, leaf = name.rsplit(".", 2) if "." in name else ("", "", name)
    if leaf == "class_path":
        return value
    leaf = f"{owner} {leaf}" if leaf.isdigit() else leaf
    return f"{leaf.replace('_', ' ')} {value}"


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
    return text if len(text) <= _LONGEST else f"…{text[1 - _LONGEST :]}"
