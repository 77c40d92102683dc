"""Pairs of a stream: a budget of them every round, and held-out ones without a pass over all."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import numpy as np

from tpmm_pl.data.parts import Parts, prompt_names, refuse_leak
from tpmm_pl.data.splits import check_fraction, hashed_share
from tpmm_pl.data.table import PairTable, join
from tpmm_pl.types import InputError

_TRAIN, _FUSE, _ELSEWHERE = "train", "fuse", "elsewhere"
"""Sides of a prompt, beside the domains of evaluation."""


class PairStream:
    """Hands out the training pairs of a stream, the next ones every round.

    A prompt's hash says whether it is trained on, so it is on the same side wherever it occurs.
    A stream that is used up begins again.

    Args:
        read: Reads the stream from its beginning, some rows at a time.
        pairs_per_round: The budget of a round.
        fuse: Fuse pairs from elsewhere; ``None``: a share of the stream's prompts is held out.
        evaluation: Held-out pairs by domain; empty: a share is held out, ``in_domain``.
        fuse_fraction: Of the prompts.
        eval_fraction: The same.
        seed: Of the hash.
        label: Names the stream in messages.

    Raises:
        InputError: If the fractions leave nothing to train on, or fuse and evaluation pairs share
            a prompt. A prompt of theirs in the stream is left out of training.
    """

    def __init__(
        self,
        read: Callable[[], Iterator[PairTable]],
        *,
        pairs_per_round: int,
        fuse: PairTable | None,
        evaluation: Mapping[str, PairTable],
        fuse_fraction: float,
        eval_fraction: float,
        seed: int,
        label: str,
    ) -> None:
        self.pairs_per_round = pairs_per_round
        self.given = dict(evaluation) if fuse is None else {**evaluation, _FUSE: fuse}
        self.fractions = {} if evaluation else {"in_domain": eval_fraction}
        if fuse is None:
            self.fractions[_FUSE] = fuse_fraction
        for fraction in (*self.fractions.values(), sum(self.fractions.values())):
            check_fraction(fraction)
        for unseen in evaluation.values():
            refuse_leak([] if fuse is None else [fuse], unseen)
        self.seed = seed
        self.label = label
        self._elsewhere = {name for table in self.given.values() for name in prompt_names(table)}
        self._read = read
        self._begin()

    def part(self, round_index: int) -> PairTable:
        """Return the training pairs of a round; the rounds before it are read first.

        Raises:
            InputError: If the stream ends before the first round is filled.
        """
        if self._round > round_index:
            self._begin()
        while self._round < round_index:
            self._last = self._take(self.pairs_per_round)
            self._round += 1
        return self._last

    def describe(self) -> str:
        """Say how many pairs a round has."""
        return f"{self.pairs_per_round} a round, as the stream has them"

    def held_out(self, *, rounds: int, limit: int) -> Parts:
        """Collect what is held out from the beginning of the stream.

        Args:
            rounds: The stream is read as far as so many rounds need.
            limit: At most so many pairs a part.

        Raises:
            InputError: If a part is left without a pair.
        """
        wanted = [name for name, fraction in self.fractions.items() if fraction and limit]
        missing, training = dict.fromkeys(wanted, limit), rounds * self.pairs_per_round
        found = {name: [join()] for name in self.fractions}
        chunks = self._read()
        while training > 0 and any(missing.values()) and (chunk := next(chunks, None)) is not None:
            sides = self._sides(chunk)
            training -= int((sides == _TRAIN).sum())
            for name in wanted:
                part = chunk.select(np.flatnonzero(sides == name)[: missing[name]])
                missing[name] -= len(part)
                found[name].append(part)
        if without := [name for name in wanted if missing[name] == limit]:
            raise InputError(
                f"{self.label}: the pairs of {rounds} rounds hold none for {' and '.join(without)};"
                " raise data.fuse_fraction and data.eval_fraction, or data.pairs_per_round"
            )
        parts = {**self.given, **{name: join(*tables) for name, tables in found.items()}}
        return Parts([], parts.pop(_FUSE), parts)

    def _begin(self) -> None:
        self._round = 0
        self._chunks = self._training_chunks()
        self._rest = self._last = join()

    def _take(self, count: int) -> PairTable:
        parts = []
        while count:
            if not self._rest:
                self._rest = next(self._chunks)
            parts.append(self._rest[:count])
            self._rest = self._rest[count:]
            count -= len(parts[-1])
        return join(*parts)

    def _training_chunks(self) -> Iterator[PairTable]:
        while True:
            seen = 0
            for chunk in self._read():
                pairs = chunk.select(np.flatnonzero(self._sides(chunk) == _TRAIN))
                seen += len(pairs)
                yield pairs
            if seen < self.pairs_per_round:
                raise InputError(
                    f"{self.label} ends after {seen} training pairs, fewer than"
                    f" data.pairs_per_round {self.pairs_per_round}; lower it, or give more data"
                )

    def _sides(self, chunk: PairTable) -> np.ndarray[tuple[int], np.dtype[np.object_]]:
        sides = [self._side(prompt) for prompt in chunk.column("prompt_id")]
        return np.array(sides, dtype=object)

    def _side(self, prompt: str) -> str:
        if prompt in self._elsewhere:
            return _ELSEWHERE
        share = hashed_share(prompt, self.seed)
        for name, fraction in self.fractions.items():
            if share < fraction:
                return name
            share -= fraction
        return _TRAIN
