"""Prompt, chosen and rejected of a row, whichever way they are written, become of one kind."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tpmm_pl.data.rows.implicit import hh_turns, shared_text, shared_turns
from tpmm_pl.data.rows.messages import WAY_OUT, Content, Message, content, kind, with_system
from tpmm_pl.types import InputError

_Turns = tuple[Message, ...]


def pair_contents(row: Mapping[str, Any], where: str) -> tuple[Content, Content, Content]:
    """Return prompt, chosen and rejected: three texts, or three lists of turns.

    Args:
        row: ``chosen``, ``rejected`` and mostly ``prompt``; conversations also ``system``.
        where: File and line, for messages.

    Raises:
        InputError: If a field is missing, empty, of another kind than its neighbours, or the
            turns do not fit together.
    """
    chosen, rejected = (content(row, name, where) for name in ("chosen", "rejected"))
    given = row.get("prompt") is not None
    prompt: Content | None = content(row, "prompt", where) if given else None
    if prompt is None and isinstance(chosen, str) and isinstance(rejected, str):
        better, worse = (hh_turns(row[name], f"{where}: {name}") for name in ("chosen", "rejected"))
        if better is None or worse is None:
            prompt, chosen, rejected = shared_text(chosen, rejected, where)
        else:
            chosen, rejected = better, worse
    if isinstance(chosen, str) and isinstance(rejected, str) and isinstance(prompt, str):
        return with_system(prompt, row, where), chosen, rejected
    if isinstance(chosen, str) or isinstance(rejected, str):
        kinds = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
        found = ", ".join(f"{name} {kind(value)}" for name, value in kinds.items())
        raise InputError(f"{where}: fields do not match ({found}); {WAY_OUT}")
    asked, chosen, rejected = _conversation(prompt, chosen, rejected, where)
    return with_system(asked, row, where), chosen, rejected


def prompt_contents(row: Mapping[str, Any], where: str) -> Content:
    """Return the prompt of a row that need not be a pair.

    Args:
        row: ``prompt``; or ``messages``, whose last answers are left out; or a pair.
        where: File and line, for messages.

    Raises:
        InputError: If there is no prompt, or it is answered already.
    """
    named_only = isinstance(row.get("prompt"), str) and isinstance(row.get("chosen"), list)
    if row.get("prompt") is not None and not named_only:
        prompt = content(row, "prompt", where)
    elif row.get("chosen") is not None and row.get("rejected") is not None:
        return pair_contents(row, where)[0]
    else:
        prompt = content(row, "prompt" if row.get("messages") is None else "messages", where)
        if isinstance(prompt, str):
            raise InputError(f"{where}: messages is a text; name a plain text 'prompt'")
        while prompt and prompt[-1]["role"] == "assistant":
            prompt = prompt[:-1]
    _refuse_answered(prompt, where)
    return with_system(prompt, row, where)


def _conversation(
    prompt: Content | None, chosen: _Turns, rejected: _Turns, where: str
) -> tuple[_Turns, _Turns, _Turns]:
    if not isinstance(prompt, tuple):
        prompt, chosen, rejected = shared_turns(chosen, rejected, where)
    _refuse_answered(prompt, where)
    return (
        prompt,
        _answer(prompt, chosen, f"{where}: chosen"),
        _answer(prompt, rejected, f"{where}: rejected"),
    )


def _answer(prompt: _Turns, turns: _Turns, where: str) -> _Turns:
    count = len(prompt)
    if len(turns) > count and turns[:count] == prompt:
        turns = turns[count:]
    first, last = turns[0]["role"], turns[-1]["role"]
    if first != "assistant":
        raise InputError(
            f"{where} begins with the role {first!r}, not 'assistant', and not with the turns of"
            " prompt; put the turns before the answer into prompt, or leave prompt out"
        )
    if last != "assistant":
        raise InputError(
            f"{where} ends with the role {last!r}, not 'assistant'; end it with the answer"
        )
    return turns


def _refuse_answered(prompt: Content, where: str) -> None:
    if not prompt:
        raise InputError(f"{where}: nothing is left to answer; add the user's turn")
    if not isinstance(prompt, str) and prompt[-1]["role"] == "assistant":
        raise InputError(f"{where}: prompt ends with the assistant; end it with the user's turn")
