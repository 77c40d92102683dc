"""Pairs in batches: packed within a token budget, in the order of a round, resumable inside it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from hashlib import sha256
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset, Sampler

from tpmm_pl import processes
from tpmm_pl.data.packing import TOKEN_BUDGET, pack_rows, pair_rows
from tpmm_pl.data.table import PairTable, as_table
from tpmm_pl.rounds import run_seed
from tpmm_pl.types import InputError, Pair, PairBatch, PairLogps


def collate(pairs: Sequence[Pair]) -> PairBatch:
    """Pack pairs into one token tree.

    Args:
        pairs: ``B`` pairs, at least one.
    """
    table = as_table(pairs)
    names = ("weight", "ref_chosen_logps", "ref_rejected_logps", "margin")
    weight, chosen, rejected, margin = (
        torch.tensor(table.column(name), dtype=torch.float32) for name in names
    )
    tree = pack_rows(pair_rows(table))
    return PairBatch(tree, weight=weight, reference=PairLogps(chosen, rejected), margin=margin)


def micro_batches(pairs: Sequence[Pair], token_budget: int = TOKEN_BUDGET) -> list[PairBatch]:
    """Pack pairs into batches that go through a model one by one.

    Args:
        pairs: As the pairs of an optimizer step; each is used once.
        token_budget: Largest number of tokens of a batch; a longer pair is a batch of its own.

    Returns:
        Pairs of one prompt stand together.
    """
    table = as_table(pairs)
    return [collate(table.select(part)) for part in pair_batches(table, token_budget)]


def cut_by_tokens(
    prompts: Sequence[Any], lengths: NDArray[np.int64], token_budget: int
) -> list[list[int]]:
    """Cut items into batches of at most so many tokens, those of one prompt together.

    Args:
        prompts: What names the prompt of each item.
        lengths: Tokens of each item's prompt, and of all that follows it, ``(M, 2)``.
        token_budget: Of a batch; an item that is longer is alone.

    Returns:
        Indices of the items; every one occurs once.
    """
    first = {prompt: index for index, prompt in reversed(list(enumerate(prompts)))}
    batches: list[list[int]] = []
    tokens = token_budget
    for index in sorted(range(len(prompts)), key=lambda index: first[prompts[index]]):
        known = bool(batches) and prompts[batches[-1][-1]] == prompts[index]
        of_prompt, behind = lengths[index].tolist()
        added = behind + (0 if known else of_prompt)
        if tokens + added > token_budget:
            batches.append([])
            tokens, added = 0, of_prompt + behind
        batches[-1].append(index)
        tokens += added
    return batches


def pair_batches(pairs: Sequence[Pair], token_budget: int) -> list[list[int]]:
    """Cut all pairs for a pass without gradients; see :func:`cut_by_tokens`."""
    table = as_table(pairs)
    prompt, chosen, rejected = table.lengths().values()
    lengths = np.stack([prompt, chosen + rejected], axis=1)
    return cut_by_tokens(table.column("prompt_id").tolist(), lengths, token_budget)


def fuse_loader(
    pairs: Sequence[Pair],
    *,
    batch_size: int,
    steps: int,
    generator: torch.Generator,
    token_budget: int = TOKEN_BUDGET,
) -> DataLoader[Pair]:
    """Return a loader of ``steps`` batches over held-out pairs, reshuffled when used up.

    Processes share each batch, as many pairs each: what cannot be shared is left out.

    Args:
        pairs: All held-out pairs, at least one.
        batch_size: Pairs a batch, of all processes together; at most all of them.
        steps: Length of the loader.
        generator: Drives the order.
        token_budget: As for :func:`micro_batches`, which make up a step.

    Raises:
        InputError: If a batch has fewer pairs than there are processes.
    """
    size = min(batch_size, len(pairs))
    order: list[int] = []
    while len(order) < steps * size:
        order += torch.randperm(len(pairs), generator=generator).tolist()
    world = processes.count()
    if size < world:
        raise InputError(
            f"{size} held-out pairs a step cannot be shared by {world} processes; give more fuse"
            " pairs and a larger fusion.batch_size, or fewer devices"
        )
    used = size - size % world
    batches = [order[step * size : step * size + used] for step in range(steps)]
    table = as_table(pairs)
    return DataLoader(
        _Packed(table),  # type: ignore[arg-type]  # a batch is a list of these
        batch_sampler=_Batches(table, batches, processes.rank(), world, token_budget),
        collate_fn=list,
        # every iteration draws a number; not from the global generator, whose state it is not
        generator=generator,
    )


class PairLoader(DataLoader[Pair]):
    """Batches of one round's epoch, in an order that depends on ``(seed, epoch)`` only.

    A batch is a list of packed micro-batches, together one optimizer step. The ranks share each
    global batch of ``batch_size * world_size`` pairs, as many pairs and about as many tokens each,
    so together they see what one process with the global batch would. What does not fill a global
    batch is left out; fewer pairs than that make one smaller batch.

    ``state_dict`` holds how many batches were handed out. A Trainer saves and loads it, and on a
    resume the next iteration goes on behind them. The Trainer needs
    ``use_distributed_sampler=False``.

    Args:
        pairs: The round's pairs.
        batch_size: Pairs a batch and rank.
        seed: Seed of the order.
        epoch: Which epoch's order; make a new loader for another one.
        rank: This process.
        world_size: Number of processes.
        shuffle: Whether to shuffle; otherwise the pairs keep their order.
        token_budget: As for :func:`micro_batches`.

    Raises:
        InputError: If there are fewer pairs than processes.
    """

    def __init__(
        self,
        pairs: Sequence[Pair],
        *,
        batch_size: int,
        seed: int,
        epoch: int,
        rank: int = 0,
        world_size: int = 1,
        shuffle: bool = True,
        token_budget: int = TOKEN_BUDGET,
    ) -> None:
        if len(pairs) < world_size:
            raise InputError(
                f"{len(pairs)} pairs cannot be shared by {world_size} processes;"
                " give more pairs or fewer devices"
            )
        generator = _generator(seed, epoch)
        count = len(pairs)
        order = torch.randperm(count, generator=generator).tolist() if shuffle else [*range(count)]
        table = as_table(pairs)
        steps = _cut(order, batch_size, world_size)
        self._batches = _Batches(table, steps, rank, world_size, token_budget)
        self._identity = {
            "pairs": count,
            "batch_size": batch_size,
            "world_size": world_size,
            "seed": seed,
            "epoch": epoch,
        }
        super().__init__(
            _Packed(table),  # type: ignore[arg-type]  # a batch is a list of these
            batch_sampler=self._batches,
            collate_fn=list,
            # every iteration draws a number; not from the global generator, whose state it is not
            generator=generator,
        )

    def rows_of(self, batch: int) -> list[int]:
        """Return the rows of the table that this process trains on in a batch, in their order."""
        return [row for part in self._batches.parts(batch) for row in part]

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
    pairs: Sequence[Pair], trainer: Any, *, batch_size: int, token_budget: int
) -> PairLoader:
    """Return the loader of a trainer's current epoch, for this process.

    Args:
        pairs: What is trained on.
        trainer: Knows the epoch and the processes.
        batch_size: Pairs a batch and rank.
        token_budget: As for :func:`micro_batches`.
    """
    return PairLoader(
        pairs,
        batch_size=batch_size,
        token_budget=token_budget,
        seed=run_seed(),
        epoch=trainer.current_epoch,
        rank=trainer.global_rank,
        world_size=trainer.world_size,
    )


class _Packed(Dataset[PairBatch]):
    """Micro-batches of a table's pairs, by the pairs' indices."""

    def __init__(self, table: PairTable) -> None:
        self.table = table

    def __getitem__(self, part: list[int]) -> PairBatch:
        return collate(self.table.select(part))


class _Batches(Sampler[list[list[int]]]):
    """The batches of this rank, cut; counts those handed out, can begin behind some once."""

    def __init__(
        self,
        table: PairTable,
        batches: list[list[int]],
        rank: int,
        world_size: int,
        token_budget: int,
    ) -> None:
        self.batches = batches
        self.yielded = 0
        self._start = 0
        self._table = table
        self._rank = rank
        self._world_size = world_size
        self._token_budget = token_budget

    def __len__(self) -> int:
        # the whole epoch's, also after `skip`: the Trainer counts from its beginning
        return len(self.batches)

    def __iter__(self) -> Iterator[list[list[int]]]:
        # a generator: nothing happens before the first batch is asked for, so the iterators that
        # the Trainer makes and throws away do not use up the start
        start, self._start = self._start, 0
        for count in range(start + 1, len(self.batches) + 1):
            self.yielded = count
            yield self.parts(count - 1)

    def skip(self, count: int) -> None:
        # a finished epoch is not resumed: what comes is the next one, from its first batch
        self._start = self.yielded = count if count < len(self.batches) else 0

    def parts(self, number: int) -> list[list[int]]:
        """Return the micro-batches of a batch, as many on every rank."""
        # where weights are sharded, ranks run their passes together
        batch = self.batches[number]
        lengths = sum(self._table.select(batch).lengths().values())
        shares = deal(batch, np.asarray(lengths), self._world_size)
        cuts = [[[share[place] for place in part] for part in self._cut(share)] for share in shares]
        return split_to(cuts[self._rank], max(map(len, cuts)))

    def _cut(self, share: list[int]) -> list[list[int]]:
        return pair_batches(self._table.select(share), self._token_budget)


def _cut(order: list[int], batch_size: int, world_size: int) -> list[list[int]]:
    size = min(batch_size, len(order) // world_size) * world_size
    count = max(len(order) // (batch_size * world_size), 1)
    return [order[batch * size : (batch + 1) * size] for batch in range(count)]


def deal(step: list[int], tokens: NDArray[np.int64], hands: int) -> list[list[int]]:
    """Deal the items of a step out, as many to each hand and about as many tokens.

    Args:
        step: The items; a multiple of ``hands``.
        tokens: Of each item.
        hands: How many processes; one keeps the order.
    """
    if hands == 1:
        return [step]
    # from the longest, there and back, so that no rank waits long for another
    places = np.argsort(-tokens, kind="stable").tolist()
    rounds = [places[start : start + hands] for start in range(0, len(places), hands)]
    return [
        [step[turn[hand if number % 2 == 0 else -1 - hand]] for number, turn in enumerate(rounds)]
        for hand in range(hands)
    ]


def split_to(parts: list[list[int]], count: int) -> list[list[int]]:
    """Halve the parts with the most items until there are ``count``."""
    parts = list(parts)
    while len(parts) < count:
        place = max(range(len(parts)), key=lambda index: len(parts[index]))
        half = len(parts[place]) // 2
        parts[place : place + 1] = [parts[place][:half], parts[place][half:]]
    return parts


def _generator(seed: int, epoch: int) -> torch.Generator:
    # hashed: seeds and epochs are small numbers, and (1, 2) must not be (2, 1)
    digest = sha256(f"{seed} {epoch}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
