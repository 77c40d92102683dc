from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tpmm_pl.data.packing import pack_rows, pad_tree, pair_rows
from tpmm_pl.types import Pair, TokenTree

Row = tuple[tuple[int, ...], tuple[int, ...]]

# few tokens, so that rows begin alike; some begin others, some come twice
IDS = st.integers(0, 2)
PROMPTS = st.lists(IDS, max_size=4).map(tuple)
ROWS = st.lists(
    st.tuples(PROMPTS, st.lists(IDS, min_size=1, max_size=4).map(tuple)), min_size=1, max_size=7
)
TWICE: list[Row] = [((1,), (2, 0)), ((1,), (2,)), ((1,), (2, 0)), ((1, 2), (0,))]
NO_PROMPT: list[Row] = [((), (1,)), ((), (1, 2, 2)), ((1,), (2,))]


def paths(tree: TokenTree) -> list[tuple[int, ...]]:
    """What every token stands behind and itself, from tokens and positions in preorder alone."""
    found: list[tuple[int, ...]] = []
    path: tuple[int, ...] = ()
    for token, position in zip(tree.tokens.tolist(), tree.positions.tolist(), strict=True):
        assert position <= len(path), "no token without the one before it"
        path = (*path[:position], token)
        found.append(path)
    return found


def whole(rows: list[Row]) -> list[tuple[int, ...]]:
    return [prompt + completion for prompt, completion in rows]


def beginnings(row: tuple[int, ...]) -> set[tuple[int, ...]]:
    return {row[:stop] for stop in range(1, len(row) + 1)}


def test_two_pairs_make_this_tree() -> None:
    # 11 and 12 are the prompt of the first pair; 12 is also the second one's answer to 11
    first = Pair("a", "", "", "", (11, 12), (13,), (14, 15))
    second = Pair("b", "", "", "", (11,), (12, 9, 1), (24,))
    tree = pack_rows(pair_rows([first, second]))
    assert tree.tokens.tolist() == [11, 12, 9, 1, 13, 14, 15, 24]
    assert tree.positions.tolist() == [0, 1, 2, 3, 2, 2, 3, 1]
    assert tree.ends.tolist() == [8, 7, 4, 4, 5, 7, 7, 8]
    assert tree.leaves.tolist() == [4, 3, 6, 7]
    assert tree.states.tolist() == [0, 1, 2, 5]
    assert tree.targets.tolist() == [13, 12, 9, 1, 14, 15, 24]
    assert tree.state_of.tolist() == [1, 0, 1, 2, 1, 3, 0]
    assert tree.row_of.tolist() == [0, 1, 1, 1, 2, 2, 3]
    assert tree.multiplicity().tolist() == [4, 3, 1, 1, 1, 1, 1, 1]
    assert {tensor.dtype for tensor in tree} == {torch.int64}


def test_all_chosen_rows_come_before_all_rejected_ones() -> None:
    first = Pair("a", "", "", "", (1, 2), (3,), (4, 5))
    second = Pair("b", "", "", "", (6,), (7,), (8,))
    rows = [(tuple(prompt), tuple(ids)) for prompt, ids in pair_rows([first, second])]
    assert rows == [
        ((1, 2), (3,)),
        ((6,), (7,)),
        ((1, 2), (4, 5)),
        ((6,), (8,)),
    ]


def test_the_end_of_a_prompt_is_one_state_of_all_its_answers() -> None:
    prompt = (1, 2, 3)
    pair = pack_rows([(prompt, (4, 5, 6, 7)), (prompt, (8, 9))])
    # states: the prompt's end once, then all but the last token of both answers
    assert (len(pair.tokens), len(pair.states), len(pair.targets)) == (3 + 4 + 2, 1 + 3 + 1, 4 + 2)
    answers: list[Row] = [(prompt, (10 + number, 5)) for number in range(8)]
    many = pack_rows(answers)
    assert (len(many.tokens), len(many.states), len(many.targets)) == (3 + 16, 1 + 8, 16)
    assert (many.state_of == 0).sum() == 8


@example(TWICE)
@example(NO_PROMPT)
@settings(deadline=None, max_examples=150)
@given(ROWS)
def test_every_distinct_beginning_is_one_token(rows: list[Row]) -> None:
    tree = pack_rows(rows)
    found, distinct = paths(tree), set().union(*map(beginnings, whole(rows)))
    assert len(tree.tokens) == len(distinct)
    assert set(found) == distinct
    assert [found[leaf] for leaf in tree.leaves] == whole(rows)
    assert {tensor.dtype for tensor in tree} == {torch.int64}


@example(TWICE)
@example(NO_PROMPT)
@settings(deadline=None, max_examples=150)
@given(ROWS)
def test_a_token_sees_its_ancestors_and_itself(rows: list[Row]) -> None:
    tree = pack_rows(rows)
    found, ends = paths(tree), tree.ends.tolist()
    for i, own in enumerate(found):
        for j, other in enumerate(found):
            assert (j <= i < ends[j]) == (own[: len(other)] == other)


@example(TWICE)
@example(NO_PROMPT)
@settings(deadline=None, max_examples=150)
@given(ROWS)
def test_the_tokens_of_every_completion_are_scored_where_they_are_predicted(
    rows: list[Row],
) -> None:
    tree = pack_rows(rows)
    found, states = paths(tree), tree.states.tolist()
    scored: list[list[tuple[tuple[int, ...], int]]] = [[] for _ in rows]
    for target, state, row in zip(tree.targets, tree.state_of, tree.row_of, strict=True):
        scored[row].append((found[states[state]], int(target)))
    for row, (prompt, completion), ours in zip(whole(rows), rows, scored, strict=True):
        # nothing predicts the first token of a row without a prompt
        first = max(1, len(prompt))
        assert ours == [(row[:stop], row[stop]) for stop in range(first, len(row))]
        assert len(ours) == len(completion) - (not prompt)
    assert tree.row_of.tolist() == sorted(tree.row_of.tolist())
    assert all(a < b for a, b in pairwise(states))
    assert set(tree.state_of.tolist()) == set(range(len(states)))


@example(TWICE, 7)
@example(NO_PROMPT, 0)
@settings(deadline=None, max_examples=150)
@given(ROWS, st.integers(0, 9))
def test_the_padded_rows_are_those_that_were_packed(rows: list[Row], pad_id: int) -> None:
    ids, mask = pad_tree(pack_rows(rows), pad_id)
    width = max(map(len, whole(rows)))
    padding = [width - len(row) for row in whole(rows)]
    assert ids.tolist() == [
        [*row, *[pad_id] * count] for row, count in zip(whole(rows), padding, strict=True)
    ]
    assert mask.tolist() == [[1] * (width - count) + [0] * count for count in padding]
    assert {ids.dtype, mask.dtype} == {torch.int64}


@example(TWICE)
@settings(deadline=None, max_examples=150)
@given(ROWS)
def test_a_token_counts_once_a_row_that_it_is_part_of(rows: list[Row]) -> None:
    tree = pack_rows(rows)
    expected = [sum(row[: len(path)] == path for row in whole(rows)) for path in paths(tree)]
    assert tree.multiplicity().tolist() == expected
    assert sum(expected) == sum(map(len, whole(rows)))


@settings(deadline=None, max_examples=150)
@given(ROWS.flatmap(lambda rows: st.tuples(st.just(rows), st.permutations(range(len(rows))))))
def test_the_order_of_rows_changes_none_of_them(case: tuple[list[Row], list[int]]) -> None:
    rows, order = case
    tree, moved = pack_rows(rows), pack_rows([rows[row] for row in order])
    for name in ("tokens", "positions", "ends", "states"):
        assert torch.equal(getattr(tree, name), getattr(moved, name))
    assert moved.leaves.tolist() == tree.leaves[order].tolist()
    for place, row in enumerate(order):
        ours, theirs = moved.row_of == place, tree.row_of == row
        assert torch.equal(moved.targets[ours], tree.targets[theirs])
        assert torch.equal(moved.state_of[ours], tree.state_of[theirs])


def test_a_row_of_one_token_without_a_prompt_is_a_tree_that_scores_nothing() -> None:
    tree = pack_rows([((), (5,))])
    assert (tree.tokens.tolist(), tree.ends.tolist(), tree.leaves.tolist()) == ([5], [1], [0])
    assert [len(part) for part in (tree.states, tree.targets, tree.state_of, tree.row_of)] == [
        0
    ] * 4
    assert {tensor.dtype for tensor in tree} == {torch.int64}
    assert tree.lengths().tolist() == tree.sums(torch.zeros(0)).tolist() == [0.0]


def test_tokens_may_be_lists_and_tuples_alike() -> None:
    lists, tuples = (
        pack_rows([([1, 2], [3]), ([1], [4])]),
        pack_rows([((1, 2), (3,)), ((1,), (4,))]),
    )
    for ours, theirs in zip(lists, tuples, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("prompt", [(), (1, 2)])
def test_an_empty_completion_is_refused(prompt: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"row 1 of 3 has an empty completion"):
        pack_rows([((1,), (2,)), (prompt, ()), ((1,), (3,))])
