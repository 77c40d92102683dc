"""Pairs cut into batches of a token budget."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tpmm_pl.data.batching import cut_by_tokens, micro_batches, pair_batches
from tpmm_pl.data.packing import pad_tree
from tpmm_pl.data.table import as_table
from tpmm_pl.types import Pair


def test_a_cut_puts_items_of_one_prompt_together_and_counts_it_once() -> None:
    lengths = np.array([(3, 2), (1, 9), (3, 2), (3, 2), (1, 2)])
    assert cut_by_tokens("abaac", lengths, 100) == [[0, 2, 3, 1, 4]]
    # 3 + 2 + 2 of the prompt a; again 3 + 2, beside which 10 are too many; 10 + 3
    assert cut_by_tokens("abaac", lengths, 13) == [[0, 2, 3], [1, 4]]
    assert cut_by_tokens("abaac", lengths, 8) == [[0, 2], [3], [1], [4]]
    assert cut_by_tokens("abaac", lengths, 1) == [[0], [2], [3], [1], [4]]
    assert cut_by_tokens([], np.zeros((0, 2), dtype=np.int64), 1) == []


def numbered(lengths: list[tuple[int, int, int]]) -> list[Pair]:
    """Pairs of (prompt, chosen tokens, rejected tokens), which their weights tell apart."""
    return [
        Pair(
            str(prompt),
            "",
            "",
            "",
            (prompt,) * (1 + prompt),
            (10 + number,) * chosen,
            (50,) * rejected,
            weight=number,
            ref_chosen_logps=-number,
            ref_rejected_logps=number / 2,
            margin=number / 4,
        )
        for number, (prompt, chosen, rejected) in enumerate(lengths)
    ]


LENGTHS = st.lists(
    st.tuples(st.integers(0, 4), st.integers(1, 6), st.integers(1, 6)), min_size=1, max_size=12
)


def most_tokens(pairs: list[Pair]) -> int:
    """Tokens of pairs whose completions share nothing."""
    of_prompts = sum(map(len, {pair.prompt_ids for pair in pairs}))
    return of_prompts + sum(len(pair.chosen_ids) + len(pair.rejected_ids) for pair in pairs)


def check_parts(parts: list[list[Pair]], pairs: list[Pair], token_budget: int) -> None:
    """Every pair once, those of one prompt together, every part within the budget and full."""
    flat = [pair.weight for part in parts for pair in part]
    assert sorted(flat) == [pair.weight for pair in pairs]
    order = list(dict.fromkeys(pair.prompt_ids for pair in pairs))
    grouped = sorted(pairs, key=lambda pair: order.index(pair.prompt_ids))
    assert flat == [pair.weight for pair in grouped]
    for part in parts:
        assert len(part) == 1 or most_tokens(part) <= token_budget
    for part, following in pairwise(parts):
        assert most_tokens([*part, following[0]]) > token_budget, "no batch is cut too early"


@example([(0, 6, 6), (1, 1, 1), (0, 1, 1)], 4)
@settings(deadline=None, max_examples=150)
@given(LENGTHS, st.integers(1, 60))
def test_micro_batches_hold_every_pair_once_within_the_budget(
    lengths: list[tuple[int, int, int]], token_budget: int
) -> None:
    pairs = numbered(lengths)
    step = micro_batches(pairs, token_budget)
    parts = [[pairs[int(number)] for number in batch.weight] for batch in step]
    check_parts(parts, pairs, token_budget)
    for part, batch in zip(parts, step, strict=True):
        assert len(part) == 1 or len(batch.tree.tokens) <= token_budget
        assert torch.equal(batch.reference.chosen, -batch.weight)
        assert torch.equal(batch.reference.rejected, batch.weight / 2)
        assert torch.equal(batch.margin, batch.weight / 4)
        ids, mask = pad_tree(batch.tree)
        rows = [row[known == 1].tolist() for row, known in zip(ids, mask, strict=True)]
        expected = [[*pair.prompt_ids, *pair.chosen_ids] for pair in part]
        assert rows == expected + [[*pair.prompt_ids, *pair.rejected_ids] for pair in part]


@settings(deadline=None, max_examples=60)
@given(LENGTHS, st.integers(1, 60))
def test_a_pass_over_all_pairs_is_cut_in_the_same_way(
    lengths: list[tuple[int, int, int]], token_budget: int
) -> None:
    pairs = numbered(lengths)
    cut = pair_batches(pairs, token_budget)
    check_parts([[pairs[index] for index in part] for part in cut], pairs, token_budget)
    assert pair_batches(as_table(pairs), token_budget) == cut


def test_a_pass_over_no_pairs_has_no_batches() -> None:
    assert pair_batches([], 10) == []


def test_a_pair_above_the_budget_is_alone() -> None:
    pairs = numbered([(0, 1, 1), (0, 9, 9), (0, 1, 1), (3, 9, 9), (2, 1, 1)])
    step = micro_batches(pairs, 6)
    assert [batch.weight.tolist() for batch in step] == [[0], [1], [2], [3], [4]]
    assert [len(batch.tree.tokens) for batch in step] == [3, 19, 3, 22, 5]
