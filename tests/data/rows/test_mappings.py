from __future__ import annotations

from typing import Any

import datasets
import pytest

from tpmm_pl.data.rows.formats import preferences, prompts
from tpmm_pl.data.rows.mappings import MAPPINGS, find_mapping
from tpmm_pl.data.rows.messages import Cell
from tpmm_pl.data.rows.report import DataReport
from tpmm_pl.data.rows.sources import DataSource
from tpmm_pl.types import InputError

# columns as the data cards document them
ULTRAFEEDBACK = {
    "prompt": "2 + 2?",
    "prompt_id": "7",
    "chosen": [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}],
    "rejected": [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "5"}],
    "messages": [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}],
    "score_chosen": 8.5,
    "score_rejected": 3.0,
}
HH = {
    "chosen": "\n\nHuman: 2 + 2?\n\nAssistant: 4",
    "rejected": "\n\nHuman: 2 + 2?\n\nAssistant: 5",
}
HELPSTEER = [
    {"prompt": "2 + 2?", "response": "5", "helpfulness": 1, "correctness": 0, "verbosity": 0},
    {"prompt": "2 + 2?", "response": "4", "helpfulness": 4, "correctness": 4, "verbosity": 0},
]
HELPSTEER2 = {
    "split": "train",
    "prompt": "2 + 2?",
    "response_1": "4",
    "response_2": "5",
    "preference_strength": -2,
    "preference_statement": "response 1 is right",
}
SHP = {
    "post_id": "x",
    "domain": "askacademia_test",
    "upvote_ratio": 0.98,
    "history": "2 + 2?",
    "human_ref_A": "5",
    "human_ref_B": "4",
    "labels": 0,
    "score_A": 2,
    "score_B": 17,
    "score_ratio": 8.5,
}
NECTAR = {
    "prompt": "\n\nHuman: 2 + 2?\n\nAssistant: ",
    "answers": [
        {"answer": "five", "model": "b", "rank": 2.0},
        {"answer": "4", "model": "a", "rank": 1.0},
        {"answer": "5", "model": "c", "rank": 3.0},
    ],
    "turns": 1,
    "num_responses": 3,
    "source": ["x"],
    "good_natured": True,
}
ORCA = {"system": "Count.", "question": "2 + 2?", "chosen": "4", "rejected": "5"}
REWARD_BENCH = {
    "prompt": "2 + 2?",
    "chosen": "4",
    "chosen_model": "a",
    "rejected": "5",
    "rejected_model": "b",
    "subset": "math-prm",
    "id": 3,
}

KNOWN: list[tuple[str, str, list[dict[str, Any]]]] = [
    ("ultrafeedback_binarized", "HuggingFaceH4/ultrafeedback_binarized", [ULTRAFEEDBACK]),
    ("hh_rlhf", "Anthropic/hh-rlhf", [HH]),
    ("helpsteer", "nvidia/HelpSteer", HELPSTEER),
    ("helpsteer", "nvidia/HelpSteer2", HELPSTEER),
    ("helpsteer2_preference", "", [HELPSTEER2]),
    ("shp", "stanfordnlp/SHP", [SHP]),
    ("nectar", "berkeley-nest/Nectar", [NECTAR]),
    ("orca_pairs", "Intel/orca_dpo_pairs", [ORCA]),
    ("reward_bench", "allenai/reward-bench", [REWARD_BENCH]),
]


def mapped(name: str, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    located = ((f"d, line {i}", row) for i, row in enumerate(rows, 1))

    def refuse(error: InputError) -> None:
        raise error

    return [row for _, row in find_mapping(name, None)(located, refuse)]


@pytest.mark.parametrize(("name", "hub_id", "rows"), KNOWN, ids=[case[1] for case in KNOWN])
def test_every_known_data_set_becomes_the_same_pair(
    monkeypatch: pytest.MonkeyPatch, name: str, hub_id: str, rows: list[dict[str, Any]]
) -> None:
    def load(path: str, *args: Any, **settings: Any) -> Any:
        assert path == (hub_id or "someone/data")
        return datasets.Dataset.from_list(rows)

    monkeypatch.setattr(datasets, "load_dataset", load)
    # by its id on the hub where it has one of its own, else by the mapping's name
    source = DataSource(hub_id or "someone/data", mapping=None if hub_id else name)
    report = DataReport()
    [pair] = preferences(source, report)
    asked: tuple[dict[str, str], ...] = ({"role": "user", "content": "2 + 2?"},)
    if name == "orca_pairs":
        asked = ({"role": "system", "content": "Count."}, *asked)
    assert pair.prompt == asked
    assert pair.chosen == ({"role": "assistant", "content": "4"},)
    assert pair.rejected == ({"role": "assistant", "content": "5"},)
    assert report.sources[source.label].read == 1
    [prompt] = prompts(source, DataReport())
    assert prompt.prompt == asked


def test_every_mapping_is_tested_above() -> None:
    assert {name for name, _, _ in KNOWN} == set(MAPPINGS)


@pytest.mark.parametrize(
    ("name", "rows", "scores"),
    [
        ("ultrafeedback_binarized", [ULTRAFEEDBACK], {"score_chosen": 8.5, "score_rejected": 3.0}),
        ("shp", [SHP], {"score_chosen": 17, "score_rejected": 2}),
        ("helpsteer", HELPSTEER, {"scores": [1.0, 4.0]}),
        ("helpsteer2_preference", [HELPSTEER2], {"scores": [0.0, -2.0]}),
        ("nectar", [NECTAR], {"ranks": [2.0, 1.0, 3.0]}),
    ],
)
def test_scores_are_kept(name: str, rows: list[dict[str, Any]], scores: dict[str, object]) -> None:
    [row] = mapped(name, rows)
    assert {key: row[key] for key in scores} == scores


def test_a_label_of_1_prefers_answer_a() -> None:
    [row] = mapped("shp", [{**SHP, "labels": Cell("1")}])
    assert row["chosen"][0]["content"] == "5"
    assert row["score_chosen"] == 2


def test_neighbours_of_one_prompt_are_one_ranking() -> None:
    other = {**HELPSTEER[0], "prompt": "3 + 3?"}
    rows = mapped("helpsteer", [*HELPSTEER, other, HELPSTEER[0]])
    assert [len(row["responses"]) for row in rows] == [2, 1, 1]


def test_turns_inside_a_prompt_are_told_apart() -> None:
    text = "hi\n<extra_id_1>Assistant\nyes?\n<extra_id_1>User\n2 + 2?"
    [row] = mapped("helpsteer2_preference", [{**HELPSTEER2, "prompt": text}])
    assert [(turn["role"], turn["content"]) for turn in row["prompt"]] == [
        ("user", "hi"),
        ("assistant", "yes?"),
        ("user", "2 + 2?"),
    ]


BAD: list[tuple[Any, dict[str, Any], str]] = [
    ("shp", {**SHP, "labels": None}, r"no column 'labels', only \['domain', .*; add it"),
    ("shp", {**SHP, "labels": 2}, r"labels is 2\.0; 1 prefers answer A, 0 answer B"),
    ("shp", {**SHP, "labels": float("nan")}, r"labels is nan; give a finite number"),
    ("shp", {"labels": 1}, r"no column 'history', only \['labels'\]; choose another mapping"),
    ("hh_rlhf", {**HH, "chosen": "hello"}, r"chosen is not of the form '.+'; choose another"),
    ("hh_rlhf", {**HH, "rejected": 1}, r"rejected is 1; it must be a text"),
    ("helpsteer", {"prompt": "a", "response": "b"}, r"no column 'helpfulness', only"),
    ("nectar", {**NECTAR, "answers": "x"}, r"answers is a text; give a list of objects"),
    ("nectar", {**NECTAR, "answers": [{"rank": 1}]}, r"answers\[0\]: no column 'answer', only"),
    ("orca_pairs", {"chosen": "a"}, r"no column 'question', only \['chosen'\]"),
    ("reward_bench", {"prompt": "a", "chosen": "b"}, r"no column 'rejected'"),
    ("ultrafeedback_binarized", {"chosen": []}, r"no column 'rejected'"),
    ({"prompt": "q"}, {"a": 1}, r"no column 'q', only \['a'\]; choose another mapping, or none"),
]


@pytest.mark.parametrize(("mapping", "row", "sentence"), BAD, ids=[case[2] for case in BAD])
def test_a_row_of_another_data_set_is_named(
    mapping: Any, row: dict[str, Any], sentence: str
) -> None:
    refused: list[InputError] = []
    rows = find_mapping(mapping, None)(iter([("d, line 3", row)]), refused.append)
    assert list(rows) == []
    [error] = refused
    with pytest.raises(InputError, match=r"^d, line 3: .*" + sentence):
        raise error
