"""Length budgets: what of a pair's tokens is kept, and what is left of too little to train on."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from tpmm_pl.registry import lookup
from tpmm_pl.types import InputError

Ids = tuple[int, ...]


class PairIds(NamedTuple):
    """The tokens of a prompt and of its two completions."""

    prompt: Ids
    chosen: Ids
    rejected: Ids


def truncate_prompt(ids: Ids, length: int, truncation: str = "keep_end") -> Ids:
    """Cut a prompt to at most ``length`` tokens.

    Args:
        ids: The prompt's tokens.
        length: The budget, in tokens.
        truncation: Which part of a longer prompt stays: ``keep_end`` or ``keep_start``.

    Raises:
        InputError: If there is no such truncation, or the budget is below 1.
    """
    if length < 1:
        raise InputError(f"a prompt's budget is {length} tokens; give at least 1")
    return lookup("truncation", truncation, _TRUNCATIONS)(ids, length)


def truncate_pair(
    ids: PairIds, max_length: int, max_prompt_length: int | None, truncation: str
) -> PairIds:
    """Cut a prompt to its budget, and both completions at their end to what it leaves.

    Args:
        ids: The whole tokens.
        max_length: Tokens of prompt and completion together.
        max_prompt_length: Tokens of the prompt; ``None``: up to ``max_length``.
        truncation: As :func:`truncate_prompt` takes it.

    Returns:
        The tokens that are kept; :func:`unusable` says whether they make a pair.

    Raises:
        InputError: As :func:`truncate_prompt`.
    """
    budget = max_length if max_prompt_length is None else min(max_prompt_length, max_length)
    prompt = truncate_prompt(ids.prompt, budget, truncation)
    room = max_length - len(prompt)
    return PairIds(prompt, ids.chosen[:room], ids.rejected[:room])


def unusable(ids: PairIds, whole: PairIds) -> str | None:
    """Return why a truncated pair cannot be trained on; ``None`` if it can.

    Args:
        ids: What :func:`truncate_pair` left.
        whole: What it was given.
    """
    if not ids.prompt:
        return "prompt without tokens"
    if not (whole.chosen and whole.rejected):
        return "completion without tokens"
    if not (ids.chosen and ids.rejected):
        return "completion empty after truncation"
    if ids.chosen == ids.rejected:
        return "chosen and rejected have the same tokens"
    return None


def _keep_end(ids: Ids, length: int) -> Ids:
    return ids[-length:]


def _keep_start(ids: Ids, length: int) -> Ids:
    return ids[:length]


_TRUNCATIONS: dict[str, Callable[[Ids, int], Ids]] = {
    "keep_end": _keep_end,
    "keep_start": _keep_start,
}
