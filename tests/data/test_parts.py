from __future__ import annotations

from math import nan

import numpy as np
import pytest

from tpmm_pl.data.parts import (
    TableRounds,
    hold_out,
    ordered,
    prompt_names,
    refuse_leak,
    split_parts,
    with_noise,
)
from tpmm_pl.data.table import PairTable, as_table, join
from tpmm_pl.noise import LabelNoise
from tpmm_pl.types import InputError, Pair


def pair(index: int, copy: int = 0, score: float = nan) -> Pair:
    return Pair(
        prompt_id=f"p{index}",
        prompt=f"prompt {index}",
        chosen=str(copy),
        rejected="",
        prompt_ids=(index,),
        chosen_ids=(7, 7),
        rejected_ids=(8,),
        score_chosen=score,
        score_rejected=0.0,
    )


def table(*prompts: int) -> PairTable:
    return as_table([pair(index, copy) for copy, index in enumerate(prompts)])


def _number(name: str) -> int:
    return int(name[1:])


def test_every_round_has_the_next_shard_and_after_the_last_comes_the_first() -> None:
    rounds = TableRounds(table(*range(5)), 2)
    shards = [prompt_names(rounds.part(index)) for index in (1, 2, 3)]
    assert shards == [["p0", "p1"], ["p2", "p3"], ["p4", "p0"]]
    assert len(TableRounds(table(0, 1), 5).part(3)) == 2


def test_prompts_are_held_out_of_all_tables_with_all_of_their_pairs() -> None:
    tables = [table(*range(10), *range(5)), table(*range(8, 20))]
    kept, held_out = hold_out(tables, 0.25, seed=3)
    unseen = set(prompt_names(held_out))
    assert len(unseen) == 5
    assert not unseen & {name for one in kept for name in prompt_names(one)}
    assert len(kept) == 2
    assert sum(map(len, kept)) + len(held_out) == sum(map(len, tables))


def test_what_is_not_given_is_held_out_evaluation_first() -> None:
    train = [table(*range(40))]
    parts = split_parts(train, None, {}, fuse_fraction=0.2, eval_fraction=0.1, seed=0)
    assert (len(parts.evaluation["in_domain"]), len(parts.fuse)) == (4, 7)
    sides = [*parts.train, parts.fuse, parts.evaluation["in_domain"]]
    names = [set(prompt_names(side)) for side in sides]
    assert set.union(*names) == {f"p{index}" for index in range(40)}
    assert sum(map(len, names)) == 40
    other = split_parts(train, None, {}, fuse_fraction=0.3, eval_fraction=0.1, seed=0)
    assert prompt_names(other.evaluation["in_domain"]) == sorted(names[-1], key=_number)


@pytest.mark.parametrize(
    ("fuse", "evaluation"), [((3,), ()), ((9,), (9,)), (None, (3,))], ids=["fuse", "both", "eval"]
)
def test_a_prompt_given_on_two_sides_is_refused(
    fuse: tuple[int, ...] | None, evaluation: tuple[int, ...]
) -> None:
    with pytest.raises(InputError, match=r"1 prompts are in .* 'prompt (3|9)'; take them out"):
        split_parts(
            [table(1, 2, 3)],
            None if fuse is None else table(*fuse),
            {"in_domain": table(*evaluation)} if evaluation else {},
            fuse_fraction=0.0,
            eval_fraction=0.0,
            seed=0,
        )
    refuse_leak([table(1, 2)], table(3))


def test_without_weights_tables_are_shuffled_as_one() -> None:
    tables = [table(*range(30)), table(*range(30, 60))]
    order = prompt_names(ordered(tables, [None, None], seed=1))
    assert sorted(order) == sorted(f"p{index}" for index in range(60))
    assert order == prompt_names(ordered([join(*tables)], [None], seed=1))
    first = sum(_number(name) < 30 for name in order[:30])
    assert 5 < first < 25


def test_with_weights_tables_are_mixed_in_proportion_and_no_pair_is_lost() -> None:
    tables = [table(*range(1000)), table(*range(1000, 2000))]
    order = [_number(name) for name in prompt_names(ordered(tables, [1.0, 4.0], seed=1))]
    assert sorted(order) == list(range(2000))
    # 1,000 draws at 1/5: 200, five standard deviations are 63
    assert sum(index < 1000 for index in order[:1000]) == pytest.approx(200, abs=63)
    own = [index for index in order if index < 1000]
    assert own != sorted(own), "each table is shuffled"


def test_noise_swaps_labels_and_records_it() -> None:
    pairs = table(*range(400))
    assert with_noise(pairs, None, "0/train") is pairs
    noisy = with_noise(pairs, LabelNoise(flip=0.25), "0/train")
    flipped = noisy.column("flipped")
    # a rate of 1/4 among 400: five standard deviations are 0.11
    assert flipped.mean() == pytest.approx(0.25, abs=0.11)
    for index in np.flatnonzero(flipped)[:3].tolist():
        assert noisy[index].rejected == pairs[index].chosen
        assert noisy[index].rejected_ids == (7, 7)
    again = with_noise(pairs, LabelNoise(flip=0.25), "0/train").column("flipped")
    assert again.tolist() == flipped.tolist()
    other = with_noise(pairs, LabelNoise(flip=0.25), "1/train").column("flipped")
    assert other.tolist() != flipped.tolist()


def test_noise_sees_scores_and_lengths_of_each_pair() -> None:
    pairs = as_table([pair(0, score=9.0), pair(1, score=-9.0)])
    noisy = with_noise(pairs, LabelNoise(temperature=0.1), "0/train")
    assert noisy.column("flipped").tolist() == [False, True]
    shorter = with_noise(pairs.flipped([0]), LabelNoise(length_bias=1.0), "0/train")
    assert [one.chosen_ids for one in shorter] == [(7, 7), (7, 7)]
    with pytest.raises(InputError, match="needs the scores of both completions"):
        with_noise(table(0), LabelNoise(temperature=0.1), "0/train")
