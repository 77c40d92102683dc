"""Rows that rank several answers become rows of pairs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import combinations, pairwise
from typing import Any, NamedTuple

from tpmm_pl.data.rows.columns import json_list, number
from tpmm_pl.data.rows.messages import columns, kind, quoted
from tpmm_pl.types import InputError

TIE = "answers with equal scores"
TOO_FEW = "rankings of fewer than two answers"

_ANSWERS = ("responses", "completions", "answers")
_SCORES = ("scores", "ranks")
_ANSWER = ("answer", "response", "completion", "text", "content", "messages")
_SCORE = ("score", "rank")


class _Ranked(NamedTuple):
    answer: Any
    score: float
    """Higher is better."""


_Choose = Callable[[Sequence[_Ranked]], Iterator[tuple[_Ranked, _Ranked]]]


def _best_worst(ranked: Sequence[_Ranked]) -> Iterator[tuple[_Ranked, _Ranked]]:
    yield ranked[0], ranked[-1]


def _all(ranked: Sequence[_Ranked]) -> Iterator[tuple[_Ranked, _Ranked]]:
    return combinations(ranked, 2)


PAIRINGS: dict[str, _Choose] = {
    "best_worst": _best_worst,
    "adjacent": pairwise,
    "all": _all,
    "margin": _all,
}
"""Which answers of a ranking, best first, make pairs; ``margin`` notes the scores' difference."""


def pair_rows(
    row: Mapping[str, Any], where: str, pairing: str
) -> tuple[list[Mapping[str, Any]], Counter[str]]:
    """Spread a ranking into rows of pairs; any other row comes back alone.

    A ranking has a list of answers (``responses``, ``completions`` or ``answers``) and either
    ``scores`` (higher is better) or ``ranks`` (lower is better); or a list of objects, each with
    its answer and its ``score`` or ``rank``.

    Args:
        row: A row of any shape.
        where: File and line, for messages.
        pairing: A name of :data:`PAIRINGS`. Answers of equal score make no pair.

    Returns:
        Rows with ``chosen``, ``rejected``, ``score_chosen``, ``score_rejected`` (a rank with its
        sign changed) and the ranking's other columns; and how many pairs were dropped and why.

    Raises:
        InputError: If the ranking has no scores, or not one finite number an answer.
    """
    name = next((name for name in _ANSWERS if row.get(name) is not None), None)
    if name is None or "chosen" in row:
        return [row], Counter()
    ranked = sorted(_ranked(row, name, where), key=lambda one: -one.score)
    if len(ranked) < 2:
        return [], Counter({TOO_FEW: 1})
    others = {key: row[key] for key in row if key not in (*_ANSWERS, *_SCORES)}
    rows: list[Mapping[str, Any]] = []
    dropped = Counter[str]()
    for better, worse in PAIRINGS[pairing](ranked):
        if better.score == worse.score:
            dropped[TIE] += 1
            continue
        pair = {
            "chosen": better.answer,
            "rejected": worse.answer,
            "score_chosen": better.score,
            "score_rejected": worse.score,
        }
        if pairing == "margin":
            pair["margin"] = better.score - worse.score
        rows.append({**others, **pair})
    return rows, dropped


def _ranked(row: Mapping[str, Any], name: str, where: str) -> list[_Ranked]:
    answers = json_list(row[name])
    if not isinstance(answers, list):
        raise InputError(f"{where}: {name} is {kind(answers)}; give a list of answers")
    label = next((label for label in _SCORES if row.get(label) is not None), None)
    if label is None and answers and all(isinstance(answer, dict) for answer in answers):
        return [_of_object(a, f"{where}: {name}[{i}]") for i, a in enumerate(answers)]
    if label is None:
        raise InputError(
            f"{where}: {name} without 'scores' or 'ranks', only {columns(row)}; add one number an"
            " answer"
        )
    scores = json_list(row[label])
    if not isinstance(scores, list) or len(scores) != len(answers):
        count = len(scores) if isinstance(scores, list) else kind(scores)
        raise InputError(
            f"{where}: {len(answers)} {name}, but {label} is {count}; give one number an answer"
        )
    return [
        _Ranked(answer, _higher_is_better(score, label == "ranks", f"{where}: {label}[{index}]"))
        for index, (answer, score) in enumerate(zip(answers, scores, strict=True))
    ]


def _of_object(answer: Mapping[str, Any], where: str) -> _Ranked:
    text = next((name for name in _ANSWER if answer.get(name) is not None), None)
    label = next((label for label in _SCORE if answer.get(label) is not None), None)
    if text is None or label is None:
        raise InputError(
            f"{where} has only {columns(answer)}; an object has its answer as one of"
            f" {', '.join(_ANSWER)}, and a score or rank"
        )
    score = _higher_is_better(answer[label], label == "rank", f"{where}: {label}")
    return _Ranked(answer[text], score)


def _higher_is_better(value: Any, is_rank: bool, where: str) -> float:
    found = number(value)
    if found is None:
        raise InputError(f"{where} is {quoted(value)}; give a finite number")
    return -found if is_rank else found
