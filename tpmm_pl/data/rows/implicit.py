"""Prompts that are not given apart: what chosen and rejected begin with."""

from __future__ import annotations

import re

from tpmm_pl.data.rows.messages import Message
from tpmm_pl.types import InputError

_Turns = tuple[Message, ...]

_HH_TURN = re.compile(r"(?:\A|\n\n)(Human|Assistant):")
_HH_ROLES = {"Human": "user", "Assistant": "assistant"}


def hh_turns(text: str, where: str, *, answered: bool = True) -> _Turns | None:
    r"""Read a text of the form ``"\n\nHuman: .. \n\nAssistant: .."`` (Bai et al. 2022) as turns.

    Args:
        text: Any text.
        where: File, line and field, for messages.
        answered: Whether the last turn is an answer; otherwise an empty one at the end is cut.

    Returns:
        The turns, or ``None`` where the text is not of this form.

    Raises:
        InputError: If a turn is empty.
    """
    parts = _HH_TURN.split(text.lstrip())
    if parts[0] or len(parts) < 5 or parts[1] != "Human":
        return None
    turns = [
        {"role": _HH_ROLES[author], "content": said.strip()}
        for author, said in zip(parts[1::2], parts[2::2], strict=True)
    ]
    if not answered and turns[-1] == {"role": "assistant", "content": ""}:
        turns.pop()
    for index, turn in enumerate(turns):
        if not turn["content"]:
            raise InputError(
                f"{where}: turn {index + 1}, the {turn['role']}'s, is empty; fill it or delete the"
                " row"
            )
    return tuple(turns)


def shared_turns(chosen: _Turns, rejected: _Turns, where: str) -> tuple[_Turns, _Turns, _Turns]:
    """Take the turns that both conversations begin with as the prompt.

    Returns:
        Prompt and the rest of each; both rests have a turn at least.

    Raises:
        InputError: If the first turns differ already.
    """
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


def shared_text(chosen: str, rejected: str, where: str) -> tuple[str, str, str]:
    """Take the text that both begin with, up to its last white space, as the prompt.

    The white space goes to the answers, as tokenizers join it to the word behind it.

    Returns:
        Prompt and the rest of each; prompt and rest together are the text as given. Of two texts
        that are the same, all is prompt.

    Raises:
        InputError: If both begin with no word in common.
    """
    if chosen == rejected:
        return chosen, "", ""
    # stripped: neither answer may be white space alone
    first, second = chosen.rstrip(), rejected.rstrip()
    differing = (i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b)
    shared = first[: next(differing, min(len(first), len(second)))]
    cut = max((i for i, character in enumerate(shared) if character.isspace()), default=0)
    if not shared[:cut].strip():
        raise InputError(
            f"{where}: no prompt, and chosen and rejected do not begin with the same words; add a"
            " prompt, or check that both begin with it"
        )
    return chosen[:cut], chosen[cut:], rejected[cut:]
