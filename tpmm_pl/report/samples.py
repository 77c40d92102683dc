"""Answers of the arms to the same prompts, round by round."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from math import isnan
from typing import NamedTuple

from tpmm_pl.data.pairs import read_pairs
from tpmm_pl.data.table import PairTable
from tpmm_pl.report.arms import Arm
from tpmm_pl.report.runs import Run
from tpmm_pl.types import Pair

_LONGEST = 600
"""Characters of a shown text."""


class Answer(NamedTuple):
    """One answer of a pair."""

    role: str
    """``chosen`` or ``rejected``."""
    text: str
    score: str
    """The annotator's; empty where there was none."""


class SampleRow(NamedTuple):
    """One prompt of a round's training pairs, and every arm's pair for it."""

    round: int
    """The round that trains on the pairs."""
    prompt: str
    answers: list[list[Answer]]
    """Of each arm; empty where it has no pair for the prompt."""


def sample_rows(arms: Sequence[Arm]) -> list[SampleRow]:
    """Return one prompt a round, one that as many arms, then rounds, as possible have pairs for.

    The first run of an arm speaks for it: prompts of a round are drawn by the seed.
    """
    runs = [arm.runs[0] for arm in arms]
    tables = {
        (record.round, place): table
        for place, run in enumerate(runs)
        for record in run.records
        if (table := _pairs(run, record.pairs)) is not None
    }
    prompts = {key: table.column("prompt_id").tolist() for key, table in tables.items()}
    rounds = Counter(name for names in prompts.values() for name in dict.fromkeys(names))
    rows = []
    for index in sorted({index for index, _ in tables}):
        sides = [prompts.get((index, place), []) for place in range(len(runs))]
        arms_with = Counter(name for names in sides for name in dict.fromkeys(names))
        if not arms_with:
            continue
        wanted = max(arms_with, key=lambda name: (arms_with[name], rounds[name]))
        pairs = [
            tables[index, place][names.index(wanted)] if wanted in names else None
            for place, names in enumerate(sides)
        ]
        prompt = next(pair.prompt for pair in pairs if pair is not None)
        rows.append(SampleRow(index + 1, _cut(prompt), [_answers(pair) for pair in pairs]))
    return rows


def _pairs(run: Run, file: str | None) -> PairTable | None:
    return None if file is None else read_pairs(run.store.path(file))


def _answers(pair: Pair | None) -> list[Answer]:
    if pair is None:
        return []
    flipped = " (labels swapped by noise)" if pair.flipped else ""
    return [
        Answer(f"chosen{flipped}", _cut(pair.chosen), _score(pair.score_chosen)),
        Answer("rejected", _cut(pair.rejected), _score(pair.score_rejected)),
    ]


def _score(value: float) -> str:
    return "" if isnan(value) else f"{value:.3f}"


def _cut(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]} …"
