from __future__ import annotations

import pytest

from tpmm_pl.data.tokens.truncation import PairIds, truncate_pair, truncate_prompt, unusable
from tpmm_pl.types import InputError

WHOLE = PairIds((1, 2, 3, 4), (5, 6, 7), (8,))


@pytest.mark.parametrize(
    ("truncation", "max_length", "max_prompt_length", "kept"),
    [
        ("keep_end", 7, None, WHOLE),
        ("keep_end", 6, None, PairIds((1, 2, 3, 4), (5, 6), (8,))),
        ("keep_end", 4, 2, PairIds((3, 4), (5, 6), (8,))),
        ("keep_start", 4, 2, PairIds((1, 2), (5, 6), (8,))),
        ("keep_start", 99, 3, PairIds((1, 2, 3), (5, 6, 7), (8,))),
        ("keep_end", 3, 99, PairIds((2, 3, 4), (), ())),
    ],
)
def test_a_prompt_has_its_budget_and_completions_what_it_leaves(
    truncation: str, max_length: int, max_prompt_length: int | None, kept: PairIds
) -> None:
    assert truncate_pair(WHOLE, max_length, max_prompt_length, truncation) == kept


@pytest.mark.parametrize(
    ("whole", "kept", "reason"),
    [
        (WHOLE, WHOLE, None),
        (PairIds((), (5,), (8,)), PairIds((), (5,), (8,)), "prompt without tokens"),
        (PairIds((1,), (), (8,)), PairIds((1,), (), (8,)), "completion without tokens"),
        (WHOLE, PairIds((2, 3, 4), (), ()), "completion empty after truncation"),
        (
            PairIds((1,), (5, 6), (5, 7)),
            PairIds((1,), (5,), (5,)),
            "chosen and rejected have the same tokens",
        ),
    ],
)
def test_what_cannot_be_trained_on_has_a_reason(
    whole: PairIds, kept: PairIds, reason: str | None
) -> None:
    assert unusable(kept, whole) == reason


def test_an_unknown_truncation_is_answered_with_the_nearest() -> None:
    with pytest.raises(InputError, match="unknown truncation 'keep_ends'; did you mean keep_end"):
        truncate_prompt((1, 2), 1, "keep_ends")


@pytest.mark.parametrize("length", [0, -1])
def test_a_budget_of_no_token_is_refused(length: int) -> None:
    with pytest.raises(InputError, match=f"budget is {length} tokens; give at least 1"):
        truncate_prompt((1, 2), length)
