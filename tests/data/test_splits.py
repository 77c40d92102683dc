from __future__ import annotations

from collections import Counter
from itertools import pairwise

import pytest

from tpmm_pl.data.formats import RawPair
from tpmm_pl.data.splits import (
    refuse_shared_prompts,
    shuffled_by_prompt,
    split_by_prompt,
)
from tpmm_pl.types import InputError

# prompt 0 occurs once, prompt 1 twice, ... prompt 3 four times, and so again
ROWS = [
    RawPair(f"prompt {index}", f"line {index}.{copy}", f"good {copy}", "bad")
    for index in range(20)
    for copy in range(index % 4 + 1)
]


def prompts(rows: list[RawPair]) -> set[object]:
    return {row.prompt for row in rows}


def test_no_prompt_is_on_both_sides_and_no_row_is_lost() -> None:
    train, held_out = split_by_prompt(ROWS, 0.25, seed=3)
    assert not prompts(train) & prompts(held_out)
    assert len(prompts(held_out)) == 5
    assert Counter(train + held_out) == Counter(ROWS)
    assert train == [row for row in ROWS if row in train], "the order is kept"


def test_a_split_depends_on_the_seed_and_not_on_the_copies() -> None:
    held_out = split_by_prompt(ROWS, 0.25, seed=3)[1]
    assert split_by_prompt(ROWS, 0.25, seed=3)[1] == held_out
    assert split_by_prompt(ROWS, 0.25, seed=4)[1] != held_out
    assert prompts(split_by_prompt(ROWS + ROWS, 0.25, seed=3)[1]) == prompts(held_out)


def test_conversations_are_told_apart_by_their_turns() -> None:
    asked = [({"role": "user", "content": text},) for text in "aab"]
    rows = [RawPair(turns, str(index)) for index, turns in enumerate(asked)]
    train, held_out = split_by_prompt(rows, 0.5, seed=0)
    assert {len(train), len(held_out)} == {1, 2}


@pytest.mark.parametrize(("fraction", "held"), [(0.0, 0), (0.001, 1), (0.999, 19)])
def test_a_fraction_above_0_holds_out_one_and_leaves_one(fraction: float, held: int) -> None:
    train, held_out = split_by_prompt(ROWS, fraction, seed=0)
    assert (len(prompts(train)), len(prompts(held_out))) == (20 - held, held)


def test_what_cannot_be_split_is_refused() -> None:
    with pytest.raises(InputError, match=r"fraction is 1; give a number from 0 to below 1"):
        split_by_prompt(ROWS, 1, seed=0)
    with pytest.raises(InputError, match=r"1 distinct prompts cannot be split; give more data"):
        split_by_prompt(ROWS[:1] * 5, 0.5, seed=0)


def test_a_shared_prompt_is_quoted_and_counted() -> None:
    refuse_shared_prompts(ROWS[:1], ROWS[1:])
    with pytest.raises(InputError, match=r"^2 prompts are in .*among them 'prompt 0'; take them"):
        refuse_shared_prompts(ROWS[:3], ROWS[:4] + ROWS[10:])
    long = [RawPair("x" * 100)]
    with pytest.raises(InputError, match=r"'x{77}\.\.\.'"):
        refuse_shared_prompts(long, long)


def test_shuffling_keeps_the_rows_of_a_prompt_together() -> None:
    shuffled = shuffled_by_prompt(ROWS, seed=1)
    assert Counter(shuffled) == Counter(ROWS)
    assert shuffled != ROWS
    changes = sum(a.prompt != b.prompt for a, b in pairwise(shuffled))
    assert changes == 19
