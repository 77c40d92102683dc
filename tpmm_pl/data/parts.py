"""What becomes of prepared pairs: held out, ordered, corrupted, shared out over rounds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from tpmm_pl.data.rows.mixture import mixed
from tpmm_pl.data.splits import refuse_shared_prompts, shuffled_by_prompt, split_by_prompt
from tpmm_pl.data.table import PairTable, join
from tpmm_pl.noise import LabelNoise, noisy_flips


class Parts(NamedTuple):
    """What the pairs of a data set serve for; no prompt is in two of them."""

    train: list[PairTable]
    """One a source; empty where they are streamed."""
    fuse: PairTable
    evaluation: dict[str, PairTable]
    """By domain."""


class TableRounds:
    """Hands out a shard of a table every round; after the last pair the first comes again.

    Args:
        pairs: All training pairs, in their order.
        count: Pairs a round, at least 1; of a smaller table all; ``None``: all.
    """

    def __init__(self, pairs: PairTable, count: int | None = None) -> None:
        self.pairs = pairs
        self.count = len(pairs) if count is None else min(count, len(pairs))

    def part(self, round_index: int) -> PairTable:
        """Return the shard of a round, counted from 1."""
        start = (round_index - 1) * self.count
        return self.pairs.select((start + np.arange(self.count)) % len(self.pairs))

    def describe(self) -> str:
        """Say how many pairs there are, and how many a round has."""
        share = "" if self.count == len(self.pairs) else f", {self.count} a round"
        return _counted(self.pairs) + share


def split_parts(
    tables: Sequence[PairTable],
    fuse: PairTable | None,
    evaluation: Mapping[str, PairTable],
    *,
    fuse_fraction: float,
    eval_fraction: float,
    seed: int,
) -> Parts:
    """Hold out what is not given: evaluation pairs first, then fuse pairs.

    Args:
        tables: One a source.
        fuse: Fuse pairs; ``None``: a share of the prompts is held out.
        evaluation: Held-out pairs by domain; empty: a share is held out, ``in_domain``.
        fuse_fraction: Of the prompts.
        eval_fraction: The same.
        seed: Of the draws.

    Raises:
        InputError: If a prompt is given on two sides, or there are too few to split.
    """
    evaluated = dict(evaluation)
    if not evaluation:
        tables, evaluated["in_domain"] = hold_out(tables, eval_fraction, seed)
    if fuse is None:
        tables, fuse = hold_out(tables, fuse_fraction, seed)
    else:
        refuse_leak(tables, fuse)
    for unseen in evaluated.values():
        refuse_leak([*tables, fuse], unseen)
    return Parts(list(tables), fuse, evaluated)


def hold_out(
    tables: Sequence[PairTable], fraction: float, seed: int
) -> tuple[list[PairTable], PairTable]:
    """Hold out a share of the distinct prompts of all tables; see :func:`split_by_prompt`.

    Returns:
        The tables without them, and the pairs held out.
    """
    whole = join(*tables)
    _, rows = split_by_prompt(prompt_names(whole), fraction, seed)
    held_out = whole.select(rows)
    unseen = set(prompt_names(held_out))
    kept = (
        [row for row, name in enumerate(prompt_names(table)) if name not in unseen]
        for table in tables
    )
    return [table.select(rows) for table, rows in zip(tables, kept, strict=True)], held_out


def refuse_leak(train: Sequence[PairTable], held_out: PairTable) -> None:
    """Check that no prompt is trained on and held out; see :func:`refuse_shared_prompts`."""
    names = [name for table in train for name in prompt_names(table)]
    refuse_shared_prompts(names, prompt_names(held_out), lambda row: held_out[row].prompt)


def ordered(tables: Sequence[PairTable], weights: Sequence[float | None], seed: int) -> PairTable:
    """Shuffle the pairs of all tables by prompt; with weights, mix the tables in proportion.

    Args:
        tables: One a source.
        weights: Of the sources; ``None`` for all: their pairs are shuffled as one.
        seed: Of the order.
    """
    whole = join(*tables)
    names = prompt_names(whole)
    if all(weight is None for weight in weights):
        return whole.select(shuffled_by_prompt(names, seed))
    ends = np.cumsum([len(table) for table in tables]).tolist()
    orders = [
        iter([start + row for row in shuffled_by_prompt(names[start:end], seed)])
        for start, end in zip([0, *ends], ends, strict=False)
    ]
    return whole.select(list(mixed(orders, weights, seed)))


def with_noise(pairs: PairTable, noise: LabelNoise | None, seed_key: str) -> PairTable:
    """Swap labels as an annotator errs; which ones is recorded in ``flipped``.

    Args:
        pairs: Training or fuse pairs.
        noise: ``None``: the pairs as they are.
        seed_key: Names the draw, as ``"<seed>/train"``.

    Raises:
        InputError: If the noise needs scores that are missing.
    """
    if noise is None:
        return pairs
    lengths = pairs.lengths()
    flips = noisy_flips(
        noise,
        pairs.column("score_chosen").tolist(),
        pairs.column("score_rejected").tolist(),
        lengths["chosen_ids"].tolist(),
        lengths["rejected_ids"].tolist(),
        seed_key,
    )
    return pairs.flipped(np.flatnonzero(flips))


def describe_parts(
    training: str, fuse: PairTable | None, evaluation: Mapping[str, PairTable]
) -> str:
    """Say in one line how many pairs serve for what, and how many labels noise has swapped.

    Args:
        training: How many there are, as the rounds describe themselves.
        fuse: ``None`` where nothing is learned on held-out pairs.
        evaluation: By domain.
    """
    unseen = ", ".join(f"{len(pairs)} {domain}" for domain, pairs in evaluation.items())
    parts = [f"training pairs: {training}", f"evaluation pairs: {unseen or 'none'}"]
    if fuse is not None:
        parts.insert(1, f"fuse pairs: {_counted(fuse)}")
    return "; ".join(parts)


def prompt_names(pairs: PairTable) -> list[str]:
    """Return the name of each pair's prompt."""
    names: list[str] = pairs.column("prompt_id").tolist()
    return names


def _counted(pairs: PairTable) -> str:
    swapped = int(pairs.column("flipped").sum())
    return f"{len(pairs)} ({swapped} swapped by noise)" if swapped else str(len(pairs))
