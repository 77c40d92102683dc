from __future__ import annotations

from pathlib import Path

from tests.report.written_runs import arms, config, gold, pair, write_run
from tpmm_pl.data.pairs import write_pairs
from tpmm_pl.report.samples import sample_rows
from tpmm_pl.trajectory import TrajectoryStore


def test_arms_answer_the_same_prompt_in_a_row(tmp_path: Path) -> None:
    alone = pair("every round", "of one arm", "x", "y")
    ours = [alone, pair("p", "both", "yes", "no", score_chosen=0.5, score_rejected=0.25)]
    theirs = [pair("q", "theirs", "a", "b"), pair("p", "both", "sure", "never", flipped=True)]
    first = write_run(tmp_path / "a", config(0, "last"), gold(0.5, 0.4, 0.3), pairs=[alone])
    write_pairs(first / "trajectory/round_000/first.parquet", ours)
    TrajectoryStore(first / "trajectory").update(
        0, pairs="round_000/first.parquet", pairs_sha256=None
    )
    found = arms(
        first,
        write_run(tmp_path / "b", config(0, "ema"), gold(0.5), pairs=theirs),
        write_run(tmp_path / "c", config(0, "window"), gold(0.5)),
    )
    row, *later = sample_rows(found)
    assert [one.prompt for one in later] == ["of one arm"] * 2
    assert (row.round, row.prompt) == (1, "both")
    assert row.answers == [
        [("chosen", "yes", "0.500"), ("rejected", "no", "0.250")],
        [("chosen (labels swapped by noise)", "sure", ""), ("rejected", "never", "")],
        [],
    ]


def test_a_prompt_that_comes_back_is_shown_in_every_round(tmp_path: Path) -> None:
    pairs = [pair("p", "here again", "x", "y")]
    (arm,) = arms(write_run(tmp_path / "a", config(), gold(0.5, 0.4), pairs=pairs))
    run = arm.runs[0]
    assert [row.prompt for row in sample_rows([arm])] == ["here again"] * 2
    run.store.update(1, pairs=None, pairs_sha256=None)
    assert [row.round for row in sample_rows([arm])] == [1]


def test_long_texts_are_cut(tmp_path: Path) -> None:
    pairs = [pair("p", "x" * 700, "short", "y" * 600)]
    (row,) = sample_rows(arms(write_run(tmp_path / "a", config(), gold(0.5), pairs=pairs)))
    assert row.prompt == "x" * 600 + " …"
    assert [answer.text for answer in row.answers[0]] == ["short", "y" * 600]


def test_without_pairs_there_are_no_samples(tmp_path: Path) -> None:
    assert sample_rows(arms(write_run(tmp_path / "a", config(), gold(0.5)))) == []
    assert sample_rows(arms(write_run(tmp_path / "a", config(), gold(0.5), pairs=()))) == []
