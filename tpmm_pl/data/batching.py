"""Pairs in batches: padding, the order of a round, resuming in the middle of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from hashlib import sha256
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from tpmm_pl.data.table import longest_rows
from tpmm_pl.rounds import run_seed
from tpmm_pl.types import IGNORE_INDEX, InputError, Pair, PairBatch, PairLogps


def collate(pairs: Sequence[Pair], pad_id: int) -> PairBatch:
    """Pad pairs to the longest of their sequences, chosen rows first.

    Args:
        pairs: ``B`` pairs, at least one.
        pad_id: Token id written on padding; masked, so its value changes nothing.

    Returns:
        ``N = 2 B`` right-padded rows; labels are the completions' own tokens.
    """
    pairs = list(pairs)  # once: a table makes its pairs when they are asked for
    rows = [(pair.prompt_ids, pair.chosen_ids) for pair in pairs]
    rows += [(pair.prompt_ids, pair.rejected_ids) for pair in pairs]
    input_ids, attention_mask, labels = pad_rows(rows, pad_id)
    return PairBatch(
        input_ids=input_ids,
        attention_mask=attention_mask,
        labels=labels,
        weight=_floats([pair.weight for pair in pairs]),
        reference=PairLogps(
            chosen=_floats([pair.ref_chosen_logps for pair in pairs]),
            rejected=_floats([pair.ref_rejected_logps for pair in pairs]),
        ),
        margin=_floats([pair.margin for pair in pairs]),
    )


def pad_rows(
    rows: Sequence[tuple[tuple[int, ...], tuple[int, ...]]], pad_id: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Pad rows of (prompt, completion) on the right to the longest of them.

    Returns:
        Token ids, attention mask and labels, each ``(N, T)`` int64; only completions are labelled.
    """
    length = max(len(prompt) + len(completion) for prompt, completion in rows)
    shape = (len(rows), length)
    ids, mask = np.full(shape, pad_id), np.zeros(shape, dtype=np.int64)
    labels = np.full(shape, IGNORE_INDEX)
    for row, (prompt, completion) in enumerate(rows):
        begin, end = len(prompt), len(prompt) + len(completion)
        ids[row, :end] = prompt + completion
        mask[row, :end] = 1
        labels[row, begin:end] = completion
    return torch.from_numpy(ids), torch.from_numpy(mask), torch.from_numpy(labels)


def length_sorted_batches(pairs: Sequence[Pair], batch_size: int) -> list[list[int]]:
    """Cut pairs, longest first, into batches of near equal length for passes without gradient.

    Longest first, so that a batch that does not fit in memory fails at once.

    Args:
        pairs: What to score.
        batch_size: Pairs a batch; the last one may be smaller.

    Returns:
        Indices into ``pairs``; every index occurs once.
    """
    order = np.argsort(-longest_rows(pairs), kind="stable").tolist()
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def fuse_loader(
    pairs: Sequence[Pair],
    *,
    batch_size: int,
    steps: int,
    pad_id: int,
    generator: torch.Generator,
) -> DataLoader[Pair]:
    """Return a loader of ``steps`` batches over held-out pairs, reshuffled when used up.

    Args:
        pairs: All held-out pairs, at least one.
        batch_size: Pairs a batch; at most all of them.
        steps: Length of the loader.
        pad_id: Token id written on padding.
        generator: Drives the order.
    """
    size = min(batch_size, len(pairs))
    order: list[int] = []
    while len(order) < steps * size:
        order += torch.randperm(len(pairs), generator=generator).tolist()
    return DataLoader(
        pairs,  # type: ignore[arg-type]  # a sequence is a map-style dataset
        batch_sampler=[order[step * size : (step + 1) * size] for step in range(steps)],
        collate_fn=partial(collate, pad_id=pad_id),
        # every iteration draws a number; not from the global generator, whose state it is not
        generator=generator,
    )


class PairLoader(DataLoader[Pair]):
    """Batches of one round's epoch, in an order that depends on ``(seed, epoch)`` only.

    Every rank takes its slice of each global batch of ``batch_size * world_size`` pairs, so the
    ranks together see what one process with the global batch would. What does not fill a global
    batch is left out; fewer pairs than that make one smaller batch.

    ``state_dict`` holds how many batches were handed out. A Trainer saves and loads it, and on a
    resume the next iteration goes on behind them. The Trainer needs
    ``use_distributed_sampler=False``.

    Args:
        pairs: The round's pairs.
        batch_size: Pairs a batch and rank.
        pad_id: Token id written on padding.
        seed: Seed of the order.
        epoch: Which epoch's order; make a new loader for another one.
        rank: This process.
        world_size: Number of processes.
        shuffle: Whether to shuffle; otherwise the pairs keep their order.

    Raises:
        InputError: If there are fewer pairs than processes.
    """

    def __init__(
        self,
        pairs: Sequence[Pair],
        *,
        batch_size: int,
        pad_id: int,
        seed: int,
        epoch: int,
        rank: int = 0,
        world_size: int = 1,
        shuffle: bool = True,
    ) -> None:
        if len(pairs) < world_size:
            raise InputError(
                f"{len(pairs)} pairs cannot be shared by {world_size} processes;"
                " give more pairs or fewer devices"
            )
        generator = _generator(seed, epoch)
        count = len(pairs)
        order = torch.randperm(count, generator=generator).tolist() if shuffle else [*range(count)]
        self._batches = _Batches(_cut(order, batch_size, rank, world_size))
        self._identity = {
            "pairs": count,
            "batch_size": batch_size,
            "world_size": world_size,
            "seed": seed,
            "epoch": epoch,
        }
        super().__init__(
            pairs,  # type: ignore[arg-type]  # a sequence is a map-style dataset
            batch_sampler=self._batches,
            collate_fn=partial(collate, pad_id=pad_id),
            # every iteration draws a number; not from the global generator, whose state it is not
            generator=generator,
        )

    def state_dict(self) -> dict[str, Any]:
        """Return how many batches were handed out, and of which order."""
        return {"yielded": self._batches.yielded, **self._identity}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Let the next iteration go on behind the batches that ``state`` counts.

        Raises:
            InputError: If ``state`` counts batches of another order, whose rest is unknown here.
        """
        for name, here in self._identity.items():
            if state[name] != here:
                raise InputError(
                    f"the checkpoint was written in the middle of an epoch with {name}"
                    f" {state[name]}, now it is {here}; resume with the same data and settings"
                )
        self._batches.skip(state["yielded"])


def epoch_loader(
    pairs: Sequence[Pair], trainer: Any, *, batch_size: int, pad_id: int
) -> PairLoader:
    """Return the loader of a trainer's current epoch, for this process.

    Args:
        pairs: What is trained on.
        trainer: Knows the epoch and the processes.
        batch_size: Pairs a batch and rank.
        pad_id: Token id written on padding.
    """
    return PairLoader(
        pairs,
        batch_size=batch_size,
        pad_id=pad_id,
        seed=run_seed(),
        epoch=trainer.current_epoch,
        rank=trainer.global_rank,
        world_size=trainer.world_size,
    )


class _Batches(Sampler[list[int]]):
    """The batches of this rank; counts those handed out, can begin behind some once."""

    def __init__(self, batches: list[list[int]]) -> None:
        self.batches = batches
        self.yielded = 0
        self._start = 0

    def __len__(self) -> int:
        # the whole epoch's, also after `skip`: the Trainer counts from its beginning
        return len(self.batches)

    def __iter__(self) -> Iterator[list[int]]:
        # a generator: nothing happens before the first batch is asked for, so the iterators that
        # the Trainer makes and throws away do not use up the start
        start, self._start = self._start, 0
        for count, batch in enumerate(self.batches[start:], start + 1):
            self.yielded = count
            yield batch

    def skip(self, count: int) -> None:
        # a finished epoch is not resumed: what comes is the next one, from its first batch
        self._start = self.yielded = count if count < len(self.batches) else 0


def _cut(order: list[int], batch_size: int, rank: int, world_size: int) -> list[list[int]]:
    size = min(batch_size, len(order) // world_size)
    count = max(len(order) // (batch_size * world_size), 1)
    starts = [(batch * world_size + rank) * size for batch in range(count)]
    return [order[start : start + size] for start in starts]


def _generator(seed: int, epoch: int) -> torch.Generator:
    # hashed: seeds and epochs are small numbers, and (1, 2) must not be (2, 1)
    digest = sha256(f"{seed} {epoch}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def _floats(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float32)
