from __future__ import annotations

import json
from typing import Any

import pytest

from tpmm_pl.data.rows.messages import Cell
from tpmm_pl.data.rows.rankings import PAIRINGS, TIE, TOO_FEW, pair_rows
from tpmm_pl.types import InputError

RANKING = {"prompt": "p", "responses": ["b", "a", "c"], "scores": [2, 3, 1], "system": "s"}


def pairs(row: dict[str, Any], pairing: str) -> list[tuple[Any, ...]]:
    rows, _ = pair_rows(row, "d", pairing)
    names = ("chosen", "rejected", "score_chosen", "score_rejected")
    assert all(made["prompt"] == row["prompt"] for made in rows)
    return [tuple(made[name] for name in names) for made in rows]


AB, BC, AC = ("a", "b", 3.0, 2.0), ("b", "c", 2.0, 1.0), ("a", "c", 3.0, 1.0)


@pytest.mark.parametrize(
    ("pairing", "expected"),
    [("best_worst", [AC]), ("adjacent", [AB, BC]), ("all", [AB, AC, BC]), ("margin", [AB, AC, BC])],
)
def test_a_pairing_chooses_pairs_by_rank(pairing: str, expected: list[tuple[Any, ...]]) -> None:
    assert pairs(RANKING, pairing) == expected
    assert set(PAIRINGS) == {"best_worst", "adjacent", "all", "margin"}


def test_other_columns_stay_and_margin_is_the_difference_of_scores() -> None:
    rows, dropped = pair_rows(RANKING, "d", "margin")
    assert [row["margin"] for row in rows] == [1.0, 2.0, 1.0]
    assert rows[0]["system"] == "s"
    assert "scores" not in rows[0]
    assert "margin" not in pair_rows(RANKING, "d", "all")[0][0]
    assert not dropped


def test_every_way_to_write_a_ranking_makes_the_same_pair() -> None:
    texts = ["b", "a", "c"]
    ranked: list[dict[str, Any]] = [
        {"prompt": "p", "completions": texts, "ranks": [2, 1, 3]},
        {"prompt": "p", "answers": [{"answer": t, "rank": r} for t, r in zip(texts, (2, 1, 3))]},  # noqa: B905
        {"prompt": "p", "responses": Cell(json.dumps(texts)), "ranks": Cell("[2, 1, 3]")},
    ]
    for row in ranked:
        assert pairs(row, "best_worst") == [("a", "c", -1.0, -3.0)]
    scored = {"prompt": "p", "answers": [{"text": "x", "score": 0.5}, {"text": "y", "score": 2}]}
    assert pairs(scored, "best_worst") == [("y", "x", 2.0, 0.5)]


def test_answers_may_be_turns() -> None:
    turns = [{"role": "assistant", "content": text} for text in "ab"]
    lists = [[turn] for turn in turns]
    assert pairs({"prompt": "p", "responses": lists, "scores": [0, 1]}, "all")[0][0] == lists[1]
    assert pairs({"prompt": "p", "responses": turns, "scores": [0, 1]}, "all")[0][0] == turns[1]


def test_equal_scores_make_no_pair_and_are_counted() -> None:
    row = {"prompt": "p", "responses": list("abc"), "scores": [1, 2, 1]}
    for pairing, count, ties in (("best_worst", 1, 0), ("adjacent", 1, 1), ("all", 2, 1)):
        rows, dropped = pair_rows(row, "d", pairing)
        assert (len(rows), dropped[TIE]) == (count, ties), pairing
    assert pair_rows({**row, "scores": [1, 1, 1]}, "d", "best_worst") == ([], {TIE: 1})


def test_one_answer_alone_is_counted() -> None:
    assert pair_rows({"responses": ["a"], "scores": [1]}, "d", "all") == ([], {TOO_FEW: 1})
    assert pair_rows({"responses": [], "scores": []}, "d", "all") == ([], {TOO_FEW: 1})


def test_other_rows_come_back_alone() -> None:
    row = {"prompt": "p", "chosen": "a", "rejected": "b", "responses": ["a", "b"]}
    assert pair_rows(row, "d", "all") == ([row], {})
    assert pair_rows({"prompt": "p"}, "d", "all") == ([{"prompt": "p"}], {})


BAD: list[tuple[dict[str, Any], str]] = [
    ({"responses": "a"}, r"responses is a text; give a list of answers"),
    ({"responses": ["a", "b"]}, r"responses without 'scores' or 'ranks', only \['responses'\]"),
    ({"responses": ["a", "b"], "scores": [1]}, r"2 responses, but scores is 1; give one number"),
    ({"responses": ["a", "b"], "ranks": 1}, r"2 responses, but ranks is a number; give one number"),
    ({"responses": ["a", "b"], "scores": [1, float("nan")]}, r"scores\[1\] is nan; give a finite"),
    ({"responses": ["a", "b"], "scores": [1, None]}, r"scores\[1\] is None; give a finite"),
    ({"answers": [{"answer": "a"}]}, r"answers\[0\] has only \['answer'\]; an object has its"),
    ({"answers": [{"rank": 1}]}, r"answers\[0\] has only \['rank'\]; an object has its answer"),
    ({"answers": [{"text": "a", "rank": "x"}]}, r"answers\[0\]: rank is 'x'; give a finite"),
]


@pytest.mark.parametrize(("row", "sentence"), BAD, ids=[sentence for _, sentence in BAD])
def test_a_bad_ranking_is_named(row: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InputError, match=r"^d, line 3: " + sentence):
        pair_rows(row, "d, line 3", "all")
