r"""Ready mappings from the columns of known data sets to the rows we read.

Columns as the data cards on the Hugging Face hub document them, November 2026. All make
conversations: a text that a person asked is a user's turn, its answer the assistant's.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from itertools import groupby
from typing import Any

from tpmm_pl.data.rows.columns import FIELDS, json_list, required_number
from tpmm_pl.data.rows.implicit import hh_turns
from tpmm_pl.data.rows.messages import Message, columns, kind, quoted
from tpmm_pl.registry import lookup
from tpmm_pl.types import InputError

Row = dict[str, Any]

Located = tuple[str, Row]
"""File and line, and the row that stands there."""

Refuse = Callable[[InputError], None]
"""Takes note of a row that cannot be read, or raises."""

RowMapping = Callable[[Iterator[Located], Refuse], Iterator[Located]]

_Convert = Callable[[Row, str], Row]

_HELPSTEER_TURN = re.compile(r"\n?<extra_id_1>(User|Assistant)\n")


def find_mapping(mapping: str | Mapping[str, str] | None, hub_id: str | None) -> RowMapping:
    """Return the mapping of a source.

    Args:
        mapping: A name of :data:`MAPPINGS`; or ``{our field: their column}``; or ``None``.
        hub_id: The data set on the hub, ``None`` for files; chooses the mapping if none is given.

    Raises:
        InputError: If there is no mapping or field of a name.
    """
    if mapping is None:
        name = mapping_of(hub_id)
        return MAPPINGS[name] if name else lambda rows, refuse: rows
    if isinstance(mapping, str):
        return lookup("mapping", mapping, MAPPINGS)
    for field in mapping:
        lookup("field of a mapping", field, dict.fromkeys(FIELDS))
    return _by_row(lambda row, where: _renamed(row, mapping, where))


def mapping_of(hub_id: str | None) -> str | None:
    """Return the name of the mapping made for a data set on the hub, if there is one."""
    return _HUB_IDS.get(hub_id.lower()) if hub_id else None


def _by_row(convert: _Convert) -> RowMapping:
    def mapped(rows: Iterator[Located], refuse: Refuse) -> Iterator[Located]:
        for where, row in rows:
            try:
                converted = convert(row, where)
            except InputError as error:
                refuse(error)
                continue
            yield where, converted

    return mapped


def _renamed(row: Row, mapping: Mapping[str, str], where: str) -> Row:
    taken = {field: _column(row, name, where) for field, name in mapping.items()}
    return {name: row[name] for name in row if name not in mapping.values()} | taken


def _ultrafeedback(row: Row, where: str) -> Row:
    # the text in prompt only names the conversation that chosen and rejected begin with
    names = ("chosen", "rejected", "score_chosen", "score_rejected")
    return {name: _column(row, name, where) for name in names}


def _hh_rlhf(row: Row, where: str) -> Row:
    conversations = {}
    for name in ("chosen", "rejected"):
        turns = hh_turns(_text(row, name, where), f"{where}: {name}")
        if turns is None:
            raise InputError(
                f"{where}: {name} is not of the form '\\n\\nHuman: .. \\n\\nAssistant: ..'; choose"
                " another mapping, or none"
            )
        conversations[name] = list(turns)
    return conversations


def _helpsteer(rows: Iterator[Located], refuse: Refuse) -> Iterator[Located]:
    """Group consecutive rows of one prompt into a ranking by helpfulness, 0 to 4."""
    scored = _by_row(_helpsteer_answer)(rows, refuse)
    for prompt, group in groupby(scored, key=lambda located: located[1]["prompt"]):
        answers = list(group)
        yield (
            answers[0][0],
            {
                "prompt": _helpsteer_turns(prompt),
                "responses": [_answer(row["response"]) for _, row in answers],
                "scores": [row["helpfulness"] for _, row in answers],
            },
        )


def _helpsteer_answer(row: Row, where: str) -> Row:
    return {
        "prompt": _text(row, "prompt", where),
        "response": _text(row, "response", where),
        "helpfulness": required_number(row, "helpfulness", where),
    }


def _helpsteer2_preference(row: Row, where: str) -> Row:
    # preference_strength runs from -3, response 1 is much better, to 3, response 2 is
    return {
        "prompt": _helpsteer_turns(_text(row, "prompt", where)),
        "responses": [_answer(_text(row, f"response_{i}", where)) for i in (1, 2)],
        "scores": [0.0, required_number(row, "preference_strength", where)],
    }


def _helpsteer_turns(text: str) -> list[Message]:
    first, *others = _HELPSTEER_TURN.split(text)
    authors = zip(others[::2], others[1::2], strict=True)
    return [_asked(first), *({"role": a.lower(), "content": said} for a, said in authors)]


def _shp(row: Row, where: str) -> Row:
    label = required_number(row, "labels", where)
    if label not in (0, 1):
        raise InputError(f"{where}: labels is {label}; 1 prefers answer A, 0 answer B")
    chosen, rejected = ("A", "B") if label else ("B", "A")
    return {
        "prompt": [_asked(_text(row, "history", where))],
        "chosen": [_answer(_text(row, f"human_ref_{chosen}", where))],
        "rejected": [_answer(_text(row, f"human_ref_{rejected}", where))],
        "score_chosen": row.get(f"score_{chosen}"),
        "score_rejected": row.get(f"score_{rejected}"),
    }


def _nectar(row: Row, where: str) -> Row:
    asked = _text(row, "prompt", where)
    turns = hh_turns(asked, f"{where}: prompt", answered=False)
    answers = json_list(_column(row, "answers", where))
    if not isinstance(answers, list) or not all(isinstance(answer, dict) for answer in answers):
        raise InputError(f"{where}: answers is {kind(answers)}; give a list of objects")
    located = [(answer, f"{where}: answers[{index}]") for index, answer in enumerate(answers)]
    return {
        "prompt": list(turns or [_asked(asked)]),
        "responses": [_answer(_text(answer, "answer", at)) for answer, at in located],
        "ranks": [required_number(answer, "rank", at) for answer, at in located],
    }


def _orca_pairs(row: Row, where: str) -> Row:
    return {
        "system": row.get("system"),
        "prompt": [_asked(_text(row, "question", where))],
        "chosen": [_answer(_text(row, "chosen", where))],
        "rejected": [_answer(_text(row, "rejected", where))],
    }


def _reward_bench(row: Row, where: str) -> Row:
    return {
        "prompt": [_asked(_text(row, "prompt", where))],
        "chosen": [_answer(_text(row, "chosen", where))],
        "rejected": [_answer(_text(row, "rejected", where))],
    }


MAPPINGS: dict[str, RowMapping] = {
    "ultrafeedback_binarized": _by_row(_ultrafeedback),
    "hh_rlhf": _by_row(_hh_rlhf),
    "helpsteer": _helpsteer,
    "helpsteer2_preference": _by_row(_helpsteer2_preference),
    "shp": _by_row(_shp),
    "nectar": _by_row(_nectar),
    "orca_pairs": _by_row(_orca_pairs),
    "reward_bench": _by_row(_reward_bench),
}

_HUB_IDS = {
    "huggingfaceh4/ultrafeedback_binarized": "ultrafeedback_binarized",
    "anthropic/hh-rlhf": "hh_rlhf",
    "nvidia/helpsteer": "helpsteer",
    "nvidia/helpsteer2": "helpsteer",
    "stanfordnlp/shp": "shp",
    "berkeley-nest/nectar": "nectar",
    "intel/orca_dpo_pairs": "orca_pairs",
    "allenai/reward-bench": "reward_bench",
}


def _asked(text: str) -> Message:
    return {"role": "user", "content": text}


def _answer(text: str) -> Message:
    return {"role": "assistant", "content": text}


def _column(row: Mapping[str, Any], name: str, where: str) -> Any:
    if row.get(name) is None:
        raise InputError(
            f"{where}: no column {name!r}, only {columns(row)}; choose another mapping, or none"
        )
    return row[name]


def _text(row: Mapping[str, Any], name: str, where: str) -> str:
    value = _column(row, name, where)
    if not isinstance(value, str):
        raise InputError(f"{where}: {name} is {quoted(value)}; it must be a text")
    return str(value)
