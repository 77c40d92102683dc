"""Cuts of the data by prompt: what is held out, what each round trains on."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Protocol, TypeVar

import torch

from tpmm_pl.data.formats import Content
from tpmm_pl.types import InputError


class HasPrompt(Protocol):
    """A row with a prompt, before or behind the tokenizer."""

    @property
    def prompt(self) -> Content:
        """Return what is answered."""
        ...


Row = TypeVar("Row", bound=HasPrompt)


def split_by_prompt(rows: Sequence[Row], fraction: float, seed: int) -> tuple[list[Row], list[Row]]:
    """Hold out a share of the distinct prompts, with all of their rows.

    Args:
        rows: Pairs or prompts.
        fraction: Share of the prompts to hold out, 0 to below 1; more than 0 holds out at least
            one, and one at least is left.
        seed: Seed of the draw.

    Returns:
        Rows to train on and rows held out, each in the given order; no prompt is in both.

    Raises:
        InputError: If ``fraction`` is out of range, or there are too few prompts to split.
    """
    if not 0 <= fraction < 1:
        raise InputError(f"the held-out fraction is {fraction}; give a number from 0 to below 1")
    if fraction == 0:
        return list(rows), []
    prompts = _shuffled_prompts(rows, seed)
    if len(prompts) < 2:
        raise InputError(
            f"{len(prompts)} distinct prompts cannot be split; give more data, or fraction 0"
        )
    count = min(max(round(fraction * len(prompts)), 1), len(prompts) - 1)
    chosen = set(prompts[:count])
    train = [row for row in rows if _key(row) not in chosen]
    return train, [row for row in rows if _key(row) in chosen]


def refuse_shared_prompts(train: Sequence[HasPrompt], held_out: Sequence[HasPrompt]) -> None:
    """Check that no prompt is trained on and evaluated on.

    Raises:
        InputError: If a prompt is on both sides; it is quoted.
    """
    trained_on = {_key(row) for row in train}
    shared = sorted({_key(row) for row in held_out} & trained_on)
    if shared:
        quoted = shared[0] if len(shared[0]) <= 80 else f"{shared[0][:77]}..."
        raise InputError(
            f"{len(shared)} prompts are in the training data and in the held-out data, among them"
            f" {quoted!r}; take them out of one side, or let a fraction be held out"
        )


def shards(rows: Sequence[Row], rounds: int, seed: int) -> list[list[Row]]:
    """Cut the shuffled data into one part a round; all rows of a prompt are in one part.

    Another number of rounds makes another cut: it must not change in the middle of a run.

    Args:
        rows: Pairs or prompts.
        rounds: Number of parts.
        seed: Seed of the shuffle.

    Returns:
        ``rounds`` parts; their sizes differ by no more rows than the most frequent prompt has.

    Raises:
        InputError: If there are fewer distinct prompts than rounds.
    """
    prompts = _shuffled_prompts(rows, seed)
    if len(prompts) < rounds:
        raise InputError(
            f"{len(prompts)} distinct prompts are too few for {rounds} rounds;"
            " give more data or fewer rounds"
        )
    by_prompt: dict[str, list[Row]] = {prompt: [] for prompt in prompts}
    for row in rows:
        by_prompt[_key(row)].append(row)
    parts: list[list[Row]] = [[] for _ in range(rounds)]
    for prompt in prompts:
        min(parts, key=len).extend(by_prompt[prompt])
    return parts


def _shuffled_prompts(rows: Sequence[HasPrompt], seed: int) -> list[str]:
    prompts = list(dict.fromkeys(_key(row) for row in rows))
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(prompts), generator=generator).tolist()
    return [prompts[index] for index in order]


def _key(row: HasPrompt) -> str:
    if isinstance(row.prompt, str):
        return row.prompt
    return json.dumps(row.prompt, ensure_ascii=False, sort_keys=True)


def shuffled_by_prompt(rows: Sequence[Row], seed: int) -> list[Row]:
    """Shuffle prompts; all rows of a prompt stay together, so that parts share few prompts."""
    by_prompt: dict[str, list[Row]] = {prompt: [] for prompt in _shuffled_prompts(rows, seed)}
    for row in rows:
        by_prompt[_key(row)].append(row)
    return [row for group in by_prompt.values() for row in group]
