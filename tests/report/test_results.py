from __future__ import annotations

import json
from math import sqrt
from pathlib import Path

import pytest

from tests.report.written_runs import arms, config, drift, gold, write_run, write_scores
from tpmm_pl.report.results import columns, comparisons, markdown, rows
from tpmm_pl.types import InputError


def test_what_was_shipped_has_a_row_each(tmp_path: Path) -> None:
    last = {
        "gold/in_domain": 0.1, "ship/last/sampled/gold/in_domain": 0.1,
        "ship/last/greedy/gold/in_domain": 0.15, "ship/learned/sampled/gold/in_domain": 0.7,
        "ship/merge/sampled/gold/in_domain": 0.6, "ship/merge/greedy/gold/in_domain": 0.65,
    }  # fmt: skip
    folder = write_run(tmp_path / "a", config(), [*gold(0.5, 0.4), last])
    (folder / "export" / "best").mkdir(parents=True)
    (folder / "export/best/recipe.json").write_text(json.dumps({"snapshots": [1]}))
    found = {row.what: row.values for row in rows(arms(folder))}
    assert found == {
        "start": {"gold/in_domain": [0.5]},
        "last": {"gold/in_domain": [0.1], "greedy/gold/in_domain": [0.15]},
        "best": {"gold/in_domain": [0.4]},
        "merge": {"gold/in_domain": [0.6], "greedy/gold/in_domain": [0.65]},
        "learned": {"gold/in_domain": [0.7]},
    }
    (folder / "export/best/recipe.json").write_text("{}")
    with pytest.raises(InputError, match=r"recipe\.json cannot be read"):
        rows(arms(folder))


def test_an_unfinished_run_has_the_merge_of_its_last_round(tmp_path: Path) -> None:
    metrics = [*gold(0.5), {"gold/in_domain": 0.4, "merge/gold/in_domain": 0.45}]
    found = rows(arms(write_run(tmp_path / "a", config(), metrics)))
    assert [row.what for row in found] == ["start", "last", "merge"]
    assert found[-1].values == {"gold/in_domain": [0.45]}


def test_a_start_that_arms_share_stands_once(tmp_path: Path) -> None:
    one = write_run(tmp_path / "one", config(0, "last"), gold(0.5, 0.1))
    two = write_run(tmp_path / "two", config(0, "learned"), gold(0.5, 0.3))
    three = write_run(tmp_path / "three", config(0, "ema"), gold(0.4, 0.3))
    found = [(row.arm, row.what) for row in rows(arms(one, two, three))]
    assert found == [
        ("last", "start"), ("last", "last"), ("learned", "last"), ("ema", "start"), ("ema", "last")
    ]  # fmt: skip


def test_cells_have_the_spread_over_seeds_or_the_interval_of_one(tmp_path: Path) -> None:
    several = [
        write_run(tmp_path / str(n), config(n), drift(0.5, value))
        for n, value in enumerate((0.1, 0.2, 0.3))
    ]
    alone = write_run(tmp_path / "alone", config(0, "ema"), drift(0.5, -0.0001))
    found = {(row.arm, row.what): row for row in rows(arms(*several, alone))}
    assert found["last", "last"].cell("gold/in_domain") == "0.200 ± 0.100"
    assert found["ema", "last"].cell("win/sft/in_domain") == "0.40 [0.30, 0.50]"
    # no minus in front of a zero
    assert found["ema", "last"].cell("gold/in_domain") == "0.000"
    assert found["ema", "start"].cell("accuracy/in_domain") == ""


def test_columns_are_those_that_were_measured(tmp_path: Path) -> None:
    found = rows(arms(write_run(tmp_path / "a", config(), gold(0.5, 0.4))))
    assert columns(found) == {"gold/in_domain": "gold in domain"}


def test_arms_are_compared_seed_by_seed_and_answer_by_answer(tmp_path: Path) -> None:
    folders = []
    for strategy, values in {"last": (0.1, 0.3, 0.9), "learned": (0.4, 0.4, 0.1)}.items():
        for seed, value in enumerate(values):
            # the baseline's third seed is another one
            number = seed if strategy == "last" else (0, 1, 7)[seed]
            path = tmp_path / f"{strategy}{number}"
            folders.append(write_run(path, config(number, strategy), gold(0.5, value)))
            write_scores(path, 1, [0, 0, 0, 1] if strategy == "last" else [1, 1, 0, 0])
    (found,) = comparisons(arms(*folders))
    assert (found.arm, found.against, found.judge, found.round) == ("learned", "last", "gold", 1)
    assert found.differences == pytest.approx([0.3, 0.1])
    # mean 0.2, standard deviation 0.1 sqrt 2, over the root of 2
    assert found.t == pytest.approx(0.2 / (0.1 * sqrt(2) / sqrt(2)))
    assert found.wins is not None
    # of eight answers four win, two tie
    assert found.wins.value == pytest.approx(5 / 8)
    assert found.wins.low < 5 / 8 < found.wins.high
    assert found.cells()[:5] == ["learned against last", "in domain", "+0.200", "2.0", "2 of 2"]


def test_arms_are_compared_in_the_last_round_that_both_have(tmp_path: Path) -> None:
    short = write_run(tmp_path / "a", config(0, "last"), gold(0.5, 0.2))
    longer = write_run(tmp_path / "b", config(0, "ema"), gold(0.5, 0.3, 0.9))
    (found,) = comparisons(arms(short, longer))
    assert (found.round, found.wins, found.t) == (1, None, None)
    assert found.differences == pytest.approx([0.1])


def test_without_a_shared_seed_or_a_judge_nothing_is_compared(tmp_path: Path) -> None:
    one = write_run(tmp_path / "a", config(0, "last"), gold(0.5, 0.2))
    two = write_run(tmp_path / "b", config(1, "ema"), gold(0.5, 0.3))
    unjudged = write_run(tmp_path / "c", config(0, "window"), [{}, {"length/in_domain": 3.0}])
    assert comparisons(arms(one, two, unjudged)) == []


def test_the_tables_are_markdown(tmp_path: Path) -> None:
    one = write_run(tmp_path / "a|b", None, gold(0.5, 0.25))
    two = write_run(tmp_path / "c", None, gold(0.5, 0.75))
    assert markdown(arms(one, two)) == (
        "| arm | what | gold in domain |\n"
        "| --- | --- | --- |\n"
        "| a\\|b | start | 0.500 |\n"
        "| a\\|b | last | 0.250 |\n"
        "| c | last | 0.750 |\n"
        "\n"
        "| last policies | domain | difference | t | seeds better | win rate, answers |\n"
        "| --- | --- | --- | --- | --- | --- |\n"
        "| c against a\\|b | in domain | +0.500 |  | 1 of 1 |  |\n"
    )
