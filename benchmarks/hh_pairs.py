"""Pairs for the benchmarks of training: drawn with lengths like HH's, or read from a file.

Lengths of the human preference data of Bai et al. (2022) are skewed: many short prompts and
answers, some long ones. Prompts are several turns behind a system prompt that all of them share.
Token ids are random: they do not change what a step costs.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from itertools import islice
from math import exp
from pathlib import Path
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from tpmm_pl.data.packing import pack_rows
from tpmm_pl.data.rows.formats import preferences
from tpmm_pl.data.rows.report import DataReport
from tpmm_pl.data.rows.sources import DataSource
from tpmm_pl.data.tokens.chat import tokenize_pairs
from tpmm_pl.types import Pair

Rows = Sequence[tuple[Sequence[int], Sequence[int]]]
"""Of (prompt, completion)."""

MAX_LENGTH = 512
PAD, END, FIRST = 0, 1, 2
"""Token ids of drawn pairs: padding, which no row holds; the end of a completion; other tokens."""

SYSTEM = 30
"""Tokens in front of every prompt."""


class Lengths(NamedTuple):
    """A log-normal distribution within bounds."""

    median: float
    spread: float
    shortest: int
    longest: int

    def draw(self, generator: random.Random) -> int:
        """Draw a length; what lies outside the bounds is drawn again."""
        while True:
            length = round(self.median * exp(generator.gauss(0, self.spread)))
            if self.shortest <= length <= self.longest:
                return length


PROMPTS, COMPLETIONS = Lengths(40, 1.1, 40, 400), Lengths(30, 1.0, 10, 150)
"""4 pairs have 1,410 to 3,550 tokens padded and 570 to 1,110 distinct ones (5 to 95 %); batches of
HH were counted at 1,400 to 3,600 and 600 to 1,024."""


def draw_pairs(count: int, vocabulary: int, seed: int = 0) -> list[Pair]:
    """Draw pairs; both completions of a prompt are drawn independently.

    Args:
        count: How many; fewer are the first ones of more.
        vocabulary: Tokens are below it.
        seed: Another one gives other pairs.
    """
    generator = random.Random(f"{seed}/hh")
    system = _ids(generator, SYSTEM, vocabulary)
    return [
        Pair(str(index), "", "", "", *_draw_ids(generator, system, 2, vocabulary))
        for index in range(count)
    ]


def draw_completions(count: int, completions: int, vocabulary: int, seed: int = 0) -> list[Rows]:
    """Draw ``count`` prompts, each with rows of (prompt, completion) to be scored."""
    generator = random.Random(f"{seed}/hh/completions")
    system = _ids(generator, SYSTEM, vocabulary)
    drawn = [_draw_ids(generator, system, completions, vocabulary) for _ in range(count)]
    return [[(prompt, completion) for completion in rest] for prompt, *rest in drawn]


def read_pairs(path: Path, tokenizer: PreTrainedTokenizerBase, count: int) -> list[Pair]:
    """Read the first pairs of a file in any of the row shapes that training takes.

    Completions are cut where a row has ``MAX_LENGTH`` tokens; a prompt that fills it is left out.

    Raises:
        InputError: If a row has no known shape, or there is no pair.
    """
    rows = islice(preferences(DataSource(str(path)), DataReport()), 2 * count)
    pairs, _ = tokenize_pairs(list(rows), tokenizer, max_length=MAX_LENGTH)
    return list(pairs[:count])


def in_batches(pairs: Sequence[Pair], size: int) -> list[Sequence[Pair]]:
    """Cut pairs into batches in their order."""
    return [pairs[start : start + size] for start in range(0, len(pairs), size)]


def unused_token(rows: Rows) -> int:
    """Return the smallest id that is in no row: padding that cannot be taken for a token."""
    used = {token for prompt, completion in rows for token in (*prompt, *completion)}
    return next(token for token in range(len(used) + 1) if token not in used)


class TokenCounts(NamedTuple):
    """Tokens of a batch."""

    padded: int
    """All rows as long as the longest."""
    real: int
    unique: int
    """Of the token tree."""
    completion: int


def count_tokens(rows: Rows) -> TokenCounts:
    """Count the tokens of a batch of rows."""
    lengths = [len(prompt) + len(completion) for prompt, completion in rows]
    return TokenCounts(
        padded=len(rows) * max(lengths),
        real=sum(lengths),
        unique=len(pack_rows(rows).tokens),
        completion=sum(len(completion) for _, completion in rows),
    )


def typical(batches: Sequence[Rows]) -> int:
    """Return the number of the batch with the median of the padded tokens."""
    return _by_length(batches)[len(batches) // 2]


def longest(batches: Sequence[Rows]) -> int:
    """Return the number of the batch with the most padded tokens."""
    return _by_length(batches)[-1]


def _by_length(batches: Sequence[Rows]) -> list[int]:
    padded = [count_tokens(rows).padded for rows in batches]
    return sorted(range(len(padded)), key=padded.__getitem__)


def _draw_ids(
    generator: random.Random, system: tuple[int, ...], completions: int, vocabulary: int
) -> Iterator[tuple[int, ...]]:
    # the prompt, then its completions
    prompt = system + _ids(generator, PROMPTS.draw(generator), vocabulary)
    yield prompt
    for _ in range(completions):
        length = min(COMPLETIONS.draw(generator), MAX_LENGTH - len(prompt))
        yield (*_ids(generator, length - 1, vocabulary), END)


def _ids(generator: random.Random, count: int, vocabulary: int) -> tuple[int, ...]:
    return tuple(generator.randrange(FIRST, vocabulary) for _ in range(count))
