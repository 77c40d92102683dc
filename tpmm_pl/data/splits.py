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
    prompts = list(_shuffled_groups(rows, seed))
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


def shuffled_by_prompt(rows: Sequence[Row], seed: int) -> list[Row]:
    """Shuffle prompts; all rows of a prompt stay together, so that parts share few prompts."""
    return [row for group in _shuffled_groups(rows, seed).values() for row in group]


def _shuffled_groups(rows: Sequence[Row], seed: int) -> dict[str, list[Row]]:
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(_key(row), []).append(row)
    prompts = list(groups)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(prompts), generator=generator).tolist()
    return {prompts[index]: groups[prompts[index]] for index in order}


def _key(row: HasPrompt) -> str:
    if isinstance(row.prompt, str):
        return row.prompt
    return json.dumps(row.prompt, ensure_ascii=False, sort_keys=True)
