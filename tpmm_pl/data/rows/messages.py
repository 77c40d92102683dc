"""Texts and conversations as people write them become one form: text, or checked turns."""

from __future__ import annotations

import json
import reprlib
from collections.abc import Mapping
from typing import Any

from tpmm_pl.types import InputError

Message = Mapping[str, Any]
"""One turn: ``role``, ``content`` and what chat templates know beside them."""

Content = str | tuple[Message, ...]
"""Plain text, or the turns of a conversation."""

WAY_OUT = (
    'a line is {"prompt": .., "chosen": .., "rejected": ..}, either three texts'
    ' or three lists of {"role": .., "content": ..}'
)

_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "tool": "tool",
}
"""What ShareGPT turns call their authors."""

_MAY_BE_EMPTY = {"system", "tool"}
_BESIDE_CONTENT = ("tool_calls", "name", "tool_call_id")


class Cell(str):
    """A cell of a table that knows texts only: it may stand for a number or for JSON."""

    __slots__ = ()


def content(row: Mapping[str, Any], name: str, where: str) -> Content:
    """Return a field as text or as turns; a single turn may stand without a list.

    Args:
        row: The row.
        name: The field.
        where: File and line, for messages.

    Raises:
        InputError: If the field is missing, empty, neither text nor turns, or a turn is broken.
    """
    value = row.get(name)
    if value is None:
        raise InputError(f"{where}: no field {name!r}, only {columns(row)}; {WAY_OUT}")
    if isinstance(value, Cell):
        value = _turns_of(value)
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, str | list):
        raise InputError(f"{where}: {name} is {kind(value)}; {WAY_OUT}")
    if not value or (isinstance(value, str) and not value.strip()):
        raise InputError(f"{where}: {name} is empty; fill it or delete the row")
    if isinstance(value, str):
        return sound_text(value, f"{where}: {name}")
    return tuple(_message(turn, f"{where}: {name}[{index}]") for index, turn in enumerate(value))


def with_system(prompt: Content, row: Mapping[str, Any], where: str) -> Content:
    """Put the text of the ``system`` column, if there is one, before the turns of a prompt.

    Raises:
        InputError: If the column is no text, the prompt is plain text, or another system turn
            is there already.
    """
    system = row.get("system")
    if system is None:
        return prompt
    if not isinstance(system, str):
        raise InputError(f"{where}: system is {kind(system)}; give a text")
    if not system.strip():
        return prompt
    if isinstance(prompt, str):
        raise InputError(
            f"{where}: plain text has no system turn, but there is a column 'system'; give prompt,"
            " chosen and rejected as messages, or put its text into prompt"
        )
    turn = {"role": "system", "content": sound_text(system, f"{where}: system")}
    if prompt and prompt[0]["role"] == "system":
        if prompt[0] == turn:
            return prompt
        raise InputError(f"{where}: a column 'system' and another system turn; keep one of them")
    return (turn, *prompt)


def sound_text(text: str, where: str) -> str:
    """Return a text that can be written as UTF-8.

    Raises:
        InputError: If it holds one half of a surrogate pair.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"{where} holds half a character at position {error.start} (a lone surrogate); save it"
            " as valid UTF-8"
        ) from error
    return str(text)


def sound_json(value: Any, where: str) -> Any:
    """Return a value that can be written as JSON and UTF-8.

    Raises:
        InputError: If it cannot.
    """
    try:
        text = json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError) as error:
        raise InputError(f"{where} is not JSON ({error}); give texts, numbers and lists") from error
    sound_text(text, where)
    return value


def without_nulls(value: Any) -> Any:
    """Return JSON values without the empty entries that Arrow tables fill into objects."""
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [without_nulls(item) for item in value]
    return value


def kind(value: object) -> str:
    """Name the type of a value as a person would."""
    kinds = {
        type(None): "missing",
        bool: "true or false",
        int: "a number",
        float: "a number",
        str: "a text",
        Cell: "a text",
        tuple: "messages",
        list: "a list",
        dict: "an object",
    }
    return kinds.get(type(value), f"a {type(value).__name__}")


def columns(row: Mapping[str, Any]) -> list[str]:
    """Return the names of a row's fields, sorted, for messages."""
    return sorted(map(str, row))


def quoted(value: object) -> str:
    """Return a value as Python writes it, shortened, for messages."""
    return reprlib.repr(value)


def _turns_of(cell: Cell) -> Any:
    # only a list of objects: an answer may well be JSON itself, and then it stays a text
    if cell.lstrip().startswith("["):
        try:
            value = json.loads(cell)
        except (ValueError, RecursionError):
            return str(cell)
        if isinstance(value, list) and value and all(isinstance(turn, dict) for turn in value):
            return value
    return str(cell)


def _message(turn: Any, where: str) -> Message:
    if not isinstance(turn, dict):
        raise InputError(f"{where} is {kind(turn)}; a turn has 'role' and 'content'")
    if "role" not in turn and "from" in turn:
        turn = _from_sharegpt(turn, where)
    role = turn.get("role")
    if not isinstance(role, str):
        raise InputError(f"{where}: role is {kind(role)}; it must be a text")
    said = _said(turn, where)
    message = {"role": sound_text(role, f"{where}: role"), "content": said}
    message |= {name: _beside(turn, name, where) for name in _BESIDE_CONTENT if turn.get(name)}
    spoke = said and said.strip()
    if not spoke and "tool_calls" not in message and role not in _MAY_BE_EMPTY:
        raise InputError(f"{where}: content is empty; fill it or delete the row")
    return message


def _said(turn: Mapping[str, Any], where: str) -> str | None:
    said = turn.get("content")
    if isinstance(said, list):
        said = "".join(_part(part, f"{where}: content[{i}]") for i, part in enumerate(said))
    if said is None and turn.get("tool_calls"):
        return None
    if not isinstance(said, str):
        raise InputError(f"{where}: content is {kind(said)}; it must be a text")
    return sound_text(said, f"{where}: content")


def _part(part: Any, where: str) -> str:
    if not isinstance(part, dict) or not isinstance(part.get("type"), str):
        raise InputError(f'{where} is {kind(part)}; a part is {{"type": "text", "text": ..}}')
    if part["type"] != "text":
        raise InputError(
            f"{where} is of type {quoted(part['type'])}, and only text is trained on; delete the"
            " row, or leave the part out"
        )
    if not isinstance(part.get("text"), str):
        raise InputError(f"{where}: text is {kind(part.get('text'))}; it must be a text")
    return str(part["text"])


def _from_sharegpt(turn: Mapping[str, Any], where: str) -> dict[str, Any]:
    author = turn["from"]
    if not isinstance(author, str) or author not in _ROLES:
        raise InputError(f"{where}: from is {quoted(author)}; it is one of {', '.join(_ROLES)}")
    others = {name: turn[name] for name in _BESIDE_CONTENT if name in turn}
    return {"role": _ROLES[author], "content": turn.get("value"), **others}


def _beside(turn: Mapping[str, Any], name: str, where: str) -> Any:
    value = turn[name]
    if name != "tool_calls":
        if not isinstance(value, str):
            raise InputError(f"{where}: {name} is {kind(value)}; it must be a text")
        return sound_text(value, f"{where}: {name}")
    if not isinstance(value, list) or not all(isinstance(call, dict) for call in value):
        raise InputError(f"{where}: tool_calls is {kind(value)}; give a list of objects")
    return sound_json(without_nulls(value), f"{where}: tool_calls")
