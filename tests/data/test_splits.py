from __future__ import annotations

from itertools import pairwise

import pytest

from tpmm_pl.data.splits import (
    hashed_share,
    refuse_shared_prompts,
    shuffled_by_prompt,
    split_by_prompt,
)
from tpmm_pl.types import InputError

# prompt 0 occurs once, prompt 1 twice, ... prompt 3 four times, and so again
PROMPTS = [f"prompt {index}" for index in range(20) for _ in range(index % 4 + 1)]


def named(rows: list[int], prompts: list[str] = PROMPTS) -> set[str]:
    return {prompts[row] for row in rows}


def test_no_prompt_is_on_both_sides_and_no_row_is_lost() -> None:
    train, held_out = split_by_prompt(PROMPTS, 0.25, seed=3)
    assert not named(train) & named(held_out)
    assert len(named(held_out)) == 5
    assert sorted(train + held_out) == list(range(len(PROMPTS)))
    assert train == sorted(train), "the order is kept"


def test_a_split_depends_on_the_seed_and_not_on_the_copies() -> None:
    held_out = split_by_prompt(PROMPTS, 0.25, seed=3)[1]
    assert split_by_prompt(PROMPTS, 0.25, seed=3)[1] == held_out
    assert split_by_prompt(PROMPTS, 0.25, seed=4)[1] != held_out
    twice = PROMPTS + PROMPTS
    assert named(split_by_prompt(twice, 0.25, seed=3)[1], twice) == named(held_out)


@pytest.mark.parametrize(("fraction", "held"), [(0.0, 0), (0.001, 1), (0.999, 19)])
def test_a_fraction_above_0_holds_out_one_and_leaves_one(fraction: float, held: int) -> None:
    train, held_out = split_by_prompt(PROMPTS, fraction, seed=0)
    assert (len(named(train)), len(named(held_out))) == (20 - held, held)


def test_what_cannot_be_split_is_refused() -> None:
    with pytest.raises(InputError, match=r"fraction is 1; give a number from 0 to below 1"):
        split_by_prompt(PROMPTS, 1, seed=0)
    with pytest.raises(InputError, match=r"1 distinct prompts cannot be split; give more data"):
        split_by_prompt(PROMPTS[:1] * 5, 0.5, seed=0)


def test_a_shared_prompt_is_quoted_and_counted() -> None:
    def quote(row: int) -> str:
        return f"text {row}"

    refuse_shared_prompts(PROMPTS[:1], PROMPTS[1:], quote)
    with pytest.raises(InputError, match=r"^2 prompts are in .*among them 'text 0'; take them"):
        refuse_shared_prompts(PROMPTS[:3], [*PROMPTS[:2], *PROMPTS[10:]], quote)
    with pytest.raises(InputError, match=r"'x{77}\.\.\.'"):
        refuse_shared_prompts(["a"], ["a"], lambda _: "x" * 100)


def test_shuffling_keeps_the_rows_of_a_prompt_together() -> None:
    shuffled = shuffled_by_prompt(PROMPTS, seed=1)
    assert sorted(shuffled) == list(range(len(PROMPTS)))
    assert shuffled != sorted(shuffled)
    changes = sum(PROMPTS[a] != PROMPTS[b] for a, b in pairwise(shuffled))
    assert changes == 19


def test_hashed_shares_depend_on_prompt_and_seed_and_are_spread_evenly() -> None:
    shares = [hashed_share(f"prompt {index}", seed=0) for index in range(2000)]
    assert shares == [hashed_share(f"prompt {index}", seed=0) for index in range(2000)]
    assert shares[0] != hashed_share("prompt 0", seed=1)
    assert all(0 <= share < 1 for share in shares)
    # five standard deviations of a share of 0.2 among 2,000: 0.045
    assert sum(share < 0.2 for share in shares) / 2000 == pytest.approx(0.2, abs=0.045)
