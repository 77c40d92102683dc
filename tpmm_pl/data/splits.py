"""Cuts of the data by prompt: what is held out, what each round trains on.

Rows are known here by the names of their prompts alone, and parts are lists of places.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from hashlib import sha256

import torch

from tpmm_pl.types import InputError


def split_by_prompt(
    prompts: Sequence[str], fraction: float, seed: int
) -> tuple[list[int], list[int]]:
    """Hold out a share of the distinct prompts, with all of their rows.

    Args:
        prompts: The prompt's name of every row.
        fraction: Share of the prompts to hold out, 0 to below 1; more than 0 holds out at least
            one, and one at least is left.
        seed: Seed of the draw.

    Returns:
        Rows to train on and rows held out, each in the given order; no prompt is in both.

    Raises:
        InputError: If ``fraction`` is out of range, or there are too few prompts to split.
    """
    check_fraction(fraction)
    if fraction == 0:
        return [*range(len(prompts))], []
    distinct = list(_shuffled_groups(prompts, seed))
    if len(distinct) < 2:
        raise InputError(
            f"{len(distinct)} distinct prompts cannot be split; give more data, or set"
            " data.fuse_fraction and data.eval_fraction to 0"
        )
    count = min(max(round(fraction * len(distinct)), 1), len(distinct) - 1)
    chosen = set(distinct[:count])
    train = [row for row, prompt in enumerate(prompts) if prompt not in chosen]
    return train, [row for row, prompt in enumerate(prompts) if prompt in chosen]


def check_fraction(fraction: float) -> None:
    """Refuse a share that leaves nothing.

    Raises:
        InputError: If it is not in ``[0, 1)``.
    """
    if not 0 <= fraction < 1:
        raise InputError(f"the held-out fraction is {fraction}; give a number from 0 to below 1")


def hashed_share(prompt: str, seed: int) -> float:
    """Return a prompt's place in ``[0, 1)``, the same wherever and whenever it occurs.

    Holding out places below a fraction needs no pass over the data, as of a stream.
    """
    digest = sha256(f"{seed} {prompt}".encode()).digest()
    # 53 bits: all of them fit the number, so that it stays below 1
    return (int.from_bytes(digest[:7], "big") >> 3) / 2**53


def refuse_shared_prompts(
    train: Sequence[str], held_out: Sequence[str], quote: Callable[[int], str]
) -> None:
    """Check that no prompt is trained on and evaluated on.

    Args:
        train: The prompt's name of every row.
        held_out: The same.
        quote: Gives the text of a prompt by its place in ``held_out``.

    Raises:
        InputError: If a prompt is on both sides; it is quoted.
    """
    trained_on = set(train)
    shared = {prompt: row for row, prompt in enumerate(held_out) if prompt in trained_on}
    if shared:
        text = min(map(quote, shared.values()))
        raise InputError(
            f"{len(shared)} prompts are in the training data and in the held-out data, among them"
            f" {quoted(text)}; take them out of one side, or let a fraction be held out"
        )


def quoted(text: str) -> str:
    """Return a text between quotation marks, shortened to fit in a sentence."""
    return repr(text if len(text) <= 80 else f"{text[:77]}...")


def shuffled_by_prompt(prompts: Sequence[str], seed: int) -> list[int]:
    """Shuffle prompts; all rows of a prompt stay together, so that parts share few prompts.

    Args:
        prompts: The prompt's name of every row.
        seed: Seed of the order.

    Returns:
        The rows in the new order.
    """
    return [row for group in _shuffled_groups(prompts, seed).values() for row in group]


def _shuffled_groups(prompts: Sequence[str], seed: int) -> dict[str, list[int]]:
    groups: dict[str, list[int]] = {}
    for row, prompt in enumerate(prompts):
        groups.setdefault(prompt, []).append(row)
    distinct = list(groups)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(distinct), generator=generator).tolist()
    return {distinct[index]: groups[distinct[index]] for index in order}
