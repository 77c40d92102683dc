"""Preference data and prompts in the shapes people keep them in."""

from __future__ import annotations

import gzip
import json
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from math import isfinite, nan
from pathlib import Path
from typing import Any

from tpmm_pl.types import InputError

Message = Mapping[str, str]
"""One turn: ``role`` and ``content``."""

Content = str | tuple[Message, ...]
"""Plain text, or the turns of a conversation."""

_WAY_OUT = (
    'a line is {"prompt": .., "chosen": .., "rejected": ..}, either three texts'
    ' or three lists of {"role": .., "content": ..}'
)


@dataclass(frozen=True)
class RawPrompt:
    """A prompt before template and tokenizer."""

    prompt: Content
    where: str = field(default="", compare=False)
    """File and line, for messages."""


@dataclass(frozen=True)
class RawPair(RawPrompt):
    """A preference before template and tokenizer; all three fields are of one kind."""

    chosen: Content = ""
    rejected: Content = ""
    score_chosen: float = nan
    score_rejected: float = nan
    margin: float = 0.0


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Read the objects of a ``.jsonl``, ``.jsonl.gz`` or ``.json`` (list) file.

    Raises:
        InputError: If the file is missing or unreadable, or a line is not a JSON object.
    """
    return [row for _, row in _located_rows(path)]


def read_preferences(path: Path) -> tuple[list[RawPair], Counter[str]]:
    """Read preference data.

    Args:
        path: A file :func:`read_rows` reads; each row as :func:`to_preference` takes it.

    Returns:
        The pairs in the file's order, and how many rows were dropped for which reason.

    Raises:
        InputError: As :func:`read_rows` and :func:`to_preference`; or if no pair is left.
    """
    pairs, dropped = [], Counter[str]()
    for where, row in _located_rows(path):
        pair = to_preference(row, where)
        if pair.chosen == pair.rejected:
            dropped["chosen and rejected identical"] += 1
        else:
            pairs.append(pair)
    if not pairs:
        raise InputError(f"{path} holds no usable pair (dropped: {dict(dropped)}); {_WAY_OUT}")
    return pairs, dropped


def read_prompts(path: Path) -> list[RawPrompt]:
    """Read prompts: rows with ``prompt`` (text or messages) or with bare ``messages``.

    The answers that end ``messages`` are left out, so that chat data serves as prompts.

    Raises:
        InputError: As :func:`read_rows`; or if a row has no prompt, or no row is there.
    """
    prompts = []
    for where, row in _located_rows(path):
        if "prompt" in row:
            prompt = _content(row, "prompt", where)
        else:
            prompt = _content(row, "messages", where)
            if isinstance(prompt, str):
                raise InputError(f"{where}: messages is a text; name a plain text 'prompt'")
            while prompt and prompt[-1]["role"] == "assistant":
                prompt = prompt[:-1]
        _refuse_answered(prompt, where)
        prompts.append(RawPrompt(prompt, where))
    if not prompts:
        raise InputError(f'{path} holds no prompt; a line is {{"prompt": "text or messages"}}')
    return prompts


def to_preference(row: Mapping[str, Any], where: str) -> RawPair:
    """Turn a row into a pair.

    Three shapes are read: plain texts; lists of messages; and lists of messages that begin with
    the same turns, which then are the prompt (a ``prompt`` text beside them only names it).
    ``score_chosen`` and ``score_rejected`` are kept where they are numbers; ``margin`` must be
    one where it is there.

    Args:
        row: The fields ``prompt``, ``chosen`` and ``rejected``.
        where: File and line, for messages.

    Raises:
        InputError: If a field is missing, empty, or of another type than its neighbours; or if
            ``margin`` is no finite number.
    """
    chosen, rejected = (_content(row, name, where) for name in ("chosen", "rejected"))
    prompt = _content(row, "prompt", where) if row.get("prompt") is not None else None
    if isinstance(chosen, str) and isinstance(rejected, str) and isinstance(prompt, str):
        return RawPair(prompt, where, chosen, rejected, *_scores(row), _margin(row, where))
    if isinstance(chosen, str) or isinstance(rejected, str):
        kinds = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
        found = ", ".join(f"{name} {_kind(value)}" for name, value in kinds.items())
        raise InputError(f"{where}: fields do not match ({found}); {_WAY_OUT}")
    if not isinstance(prompt, tuple):
        prompt, chosen, rejected = _shared_turns(chosen, rejected, where)
    _refuse_answered(prompt, where)
    for name, answer in (("chosen", chosen), ("rejected", rejected)):
        if answer[0]["role"] != "assistant":
            raise InputError(
                f"{where}: {name} begins with the role {answer[0]['role']!r}, not 'assistant';"
                " put the turns before the answer into prompt, or leave prompt out"
            )
    return RawPair(prompt, where, chosen, rejected, *_scores(row), _margin(row, where))


def _located_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    text = _text(path)
    if path.suffix == ".json" and text.lstrip().startswith("["):
        numbered = [
            (f"{path}, item {number}", item)
            for number, item in enumerate(_parse(text, f"{path}"), 1)
        ]
    else:
        # not splitlines: that also cuts at separators which are legal inside JSON strings
        lines = enumerate(text.split("\n"), 1)
        numbered = [
            (f"{path}, line {number}", _parse(line, f"{path}, line {number}"))
            for number, line in lines
            if line.strip()
        ]
    for where, row in numbered:
        if not isinstance(row, dict):
            raise InputError(f"{where}: {_kind(row)} where an object belongs; {_WAY_OUT}")
        yield where, row


def _text(path: Path) -> str:
    if not path.is_file():
        raise InputError(f"no file {path}; check the path")
    if not path.name.endswith((".jsonl", ".jsonl.gz", ".json")):
        raise InputError(f"{path} is of no known kind; give .jsonl, .jsonl.gz or .json")
    try:
        content = path.read_bytes()
        if path.suffix == ".gz":
            content = gzip.decompress(content)
        return content.decode("utf-8-sig")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read ({error}); save it as UTF-8 text") from error


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(
            f"{where}: not JSON ({error.msg} at column {error.colno}); one object a line"
        ) from error


def _content(row: Mapping[str, Any], name: str, where: str) -> Content:
    value = row.get(name)
    if value is None:
        raise InputError(f"{where}: no field {name!r}, only {sorted(row)}; {_WAY_OUT}")
    if not isinstance(value, str | list):
        raise InputError(f"{where}: {name} is {_kind(value)}; {_WAY_OUT}")
    if not value or (isinstance(value, str) and not value.strip()):
        raise InputError(f"{where}: {name} is empty; fill it or delete the row")
    if isinstance(value, str):
        return value
    return tuple(_message(turn, f"{where}: {name}[{index}]") for index, turn in enumerate(value))


def _message(turn: Any, where: str) -> Message:
    if not isinstance(turn, dict):
        raise InputError(f"{where} is {_kind(turn)}; a turn has 'role' and 'content'")
    for name in ("role", "content"):
        if not isinstance(turn.get(name), str):
            raise InputError(f"{where}: {name} is {_kind(turn.get(name))}; it must be a text")
    if not turn["content"].strip() and turn["role"] != "system":
        raise InputError(f"{where}: content is empty; fill it or delete the row")
    return {"role": turn["role"], "content": turn["content"]}


def _shared_turns(
    chosen: tuple[Message, ...], rejected: tuple[Message, ...], where: str
) -> tuple[tuple[Message, ...], tuple[Message, ...], tuple[Message, ...]]:
    # the last turn is an answer even where both are the same
    limit = min(len(chosen), len(rejected)) - 1
    count = 0
    while count < limit and chosen[count] == rejected[count]:
        count += 1
    if count == 0:
        raise InputError(
            f"{where}: chosen and rejected do not begin with the same turns, and there is no list"
            " of messages as prompt; add one"
        )
    return chosen[:count], chosen[count:], rejected[count:]


def _refuse_answered(prompt: Content, where: str) -> None:
    if not prompt:
        raise InputError(f"{where}: nothing is left to answer; add the user's turn")
    if not isinstance(prompt, str) and prompt[-1]["role"] == "assistant":
        raise InputError(f"{where}: prompt ends with the assistant; end it with the user's turn")


def _scores(row: Mapping[str, Any]) -> tuple[float, float]:
    chosen, rejected = (
        float(value) if isinstance(value, int | float) and isfinite(value) else nan
        for value in (row.get("score_chosen"), row.get("score_rejected"))
    )
    return chosen, rejected


def _margin(row: Mapping[str, Any], where: str) -> float:
    value = row.get("margin")
    if value is None:
        return 0.0
    if isinstance(value, bool) or not isinstance(value, int | float) or not isfinite(value):
        raise InputError(
            f"{where}: margin is {value!r}; give a finite number, by how much the chosen reward is"
            " to exceed the rejected one, or leave it out"
        )
    return float(value)


def _kind(value: object) -> str:
    kinds = {
        type(None): "missing",
        str: "a text",
        tuple: "messages",
        list: "a list",
        dict: "an object",
    }
    return kinds.get(type(value), f"a {type(value).__name__}")
