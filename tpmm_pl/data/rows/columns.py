"""The columns beside the texts: numbers, token ids, tools."""

from __future__ import annotations

import json
from collections.abc import Mapping
from math import isfinite, nan
from typing import Any

from tpmm_pl.data.rows.messages import Cell, columns, kind, quoted, sound_json, without_nulls
from tpmm_pl.types import InputError

Ids = tuple[int, ...]

Tools = tuple[Mapping[str, Any], ...]
"""JSON schemas of the functions a conversation may call."""

_IDS = (
    ("prompt_ids", "prompt_input_ids"),
    ("chosen_ids", "chosen_input_ids"),
    ("rejected_ids", "rejected_input_ids"),
)
_REFERENCE = (
    ("ref_chosen_logps", "reference_chosen_logps"),
    ("ref_rejected_logps", "reference_rejected_logps"),
)

FIELDS = (
    "prompt",
    "chosen",
    "rejected",
    "messages",
    "system",
    "tools",
    "responses",
    "scores",
    "ranks",
    "score_chosen",
    "score_rejected",
    "margin",
    "weight",
    *(name for names in (*_IDS, *_REFERENCE) for name in names),
)
"""Every column that is read."""


def number(value: Any) -> float | None:
    """Return a finite number as float; ``None`` for anything else.

    The text of a :class:`~tpmm_pl.data.rows.messages.Cell` may stand for a number.
    """
    if isinstance(value, bool) or not isinstance(value, int | float | Cell):
        return None
    try:
        found = float(value)
    except (ValueError, OverflowError):
        return None
    return found if isfinite(found) else None


def required_number(row: Mapping[str, Any], name: str, where: str) -> float:
    """Return a column as a finite number.

    Raises:
        InputError: If the column is missing or no finite number.
    """
    if row.get(name) is None:
        raise InputError(f"{where}: no column {name!r}, only {columns(row)}; add it")
    found = number(row[name])
    if found is None:
        raise InputError(f"{where}: {name} is {quoted(row[name])}; give a finite number")
    return found


def scores(row: Mapping[str, Any]) -> tuple[float, float]:
    """Return ``score_chosen`` and ``score_rejected``, NaN where they are no finite numbers."""
    chosen, rejected = (number(row.get(name)) for name in ("score_chosen", "score_rejected"))
    return nan if chosen is None else chosen, nan if rejected is None else rejected


def margin(row: Mapping[str, Any], where: str) -> float:
    """Return ``margin``, 0 where there is none.

    Raises:
        InputError: If it is no finite number.
    """
    if row.get("margin") is None:
        return 0.0
    found = number(row["margin"])
    if found is None:
        raise InputError(
            f"{where}: margin is {quoted(row['margin'])}; give a finite number, by how much the"
            " chosen reward is to exceed the rejected one, or leave it out"
        )
    return found


def weight(row: Mapping[str, Any], where: str) -> float:
    """Return ``weight``, 1 where there is none.

    Raises:
        InputError: If it is no finite number above 0.
    """
    if row.get("weight") is None:
        return 1.0
    found = number(row["weight"])
    if found is None or found <= 0:
        raise InputError(
            f"{where}: weight is {quoted(row['weight'])}; give a finite number above 0, by which"
            " the pair's loss is multiplied, or leave it out"
        )
    return found


def reference_logps(row: Mapping[str, Any], where: str) -> tuple[float, float]:
    """Return the log-probabilities of chosen and rejected under the reference, in nats.

    Returns:
        Two numbers, or NaN twice where there are no such columns.

    Raises:
        InputError: If one is there without the other, or one is no finite number.
    """
    given = [_first(row, names) for names in _REFERENCE]
    if given == [None, None]:
        return nan, nan
    chosen, rejected = map(number, given)
    if chosen is None or rejected is None:
        raise InputError(
            f"{where}: ref_chosen_logps is {quoted(given[0])} and ref_rejected_logps is"
            f" {quoted(given[1])}; give two finite numbers, or leave both out"
        )
    return chosen, rejected


def token_ids(row: Mapping[str, Any], where: str) -> tuple[Ids, Ids, Ids] | None:
    """Return the ids of prompt, chosen and rejected of a pre-tokenised row, else ``None``.

    Raises:
        InputError: If one of the three is missing, empty, or no list of whole numbers from 0 on.
    """
    given = [_first(row, names) for names in _IDS]
    if given[1] is None and given[2] is None:
        return None
    prompt, chosen, rejected = (
        _ids(value, names[0], row, where) for value, names in zip(given, _IDS, strict=True)
    )
    return prompt, chosen, rejected


def tools(row: Mapping[str, Any], where: str) -> Tools | None:
    """Return the JSON schemas of ``tools``, given as a list or as its JSON text.

    Raises:
        InputError: If it is neither, or holds something else than objects.
    """
    value = row.get("tools")
    if isinstance(value, str):
        value = _loads(value)
    if value is None or value in ("", []):
        return None
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise InputError(
            f"{where}: tools is {quoted(row['tools'])}; give a list of JSON schemas, or its text"
        )
    return tuple(sound_json(without_nulls(value), f"{where}: tools"))


def json_list(value: Any) -> Any:
    """Return what the JSON text of a cell stands for; anything else as it is."""
    return _loads(value) if isinstance(value, Cell) else value


def _first(row: Mapping[str, Any], names: tuple[str, ...]) -> Any:
    return next((row[name] for name in names if row.get(name) is not None), None)


def _loads(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def _ids(value: Any, name: str, row: Mapping[str, Any], where: str) -> Ids:
    if value is None:
        raise InputError(
            f"{where}: no column {name!r}, only {columns(row)}; a pre-tokenised row has prompt_ids,"
            " chosen_ids and rejected_ids"
        )
    value = json_list(value)
    if not isinstance(value, list):
        raise InputError(f"{where}: {name} is {kind(value)}; give a list of token ids")
    if not value:
        raise InputError(f"{where}: {name} is empty; fill it or delete the row")
    for index, token in enumerate(value):
        if isinstance(token, bool) or not isinstance(token, int) or token < 0:
            raise InputError(
                f"{where}: {name}[{index}] is {quoted(token)}; give whole numbers from 0 on"
            )
    return tuple(value)
