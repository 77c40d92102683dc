"""Every shape of a row becomes the same literal pair."""

from __future__ import annotations

import csv
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tpmm_pl.data.rows.formats import RawPair, preferences, prompts, to_preference
from tpmm_pl.data.rows.report import DataReport
from tpmm_pl.data.rows.sources import DataSource

DOCUMENT = Path(__file__).parents[3] / "docs" / "data.md"


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


PLAIN = {"prompt": "2 + 2 = ", "chosen": "4", "rejected": "5"}
CHAT = {"prompt": [user("hi")], "chosen": [assistant("hello")], "rejected": [assistant("no")]}


def pairs_of(folder: Path, *rows: dict[str, Any]) -> list[RawPair]:
    (folder / "d.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return list(preferences(DataSource(str(folder / "d.jsonl")), DataReport()))


ASKED, FOUR, FIVE = [user("2 + 2?")], [assistant("4")], [assistant("5")]
SHAREGPT = {"user": "human", "assistant": "gpt"}


def sharegpt(turns: list[dict[str, str]]) -> list[dict[str, str]]:
    return [{"from": SHAREGPT[turn["role"]], "value": turn["content"]} for turn in turns]


def parts(turns: list[dict[str, str]]) -> list[dict[str, Any]]:
    return [{**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in turns]


CONVERSATIONS: dict[str, dict[str, Any]] = {
    "prompt and answers": {"prompt": ASKED, "chosen": FOUR, "rejected": FIVE},
    "one turn without a list": {"prompt": ASKED[0], "chosen": FOUR[0], "rejected": FIVE[0]},
    "shared turns": {"chosen": ASKED + FOUR, "rejected": ASKED + FIVE},
    "shared turns and a name": {
        "prompt": "2 + 2?",
        "chosen": ASKED + FOUR,
        "rejected": ASKED + FIVE,
    },
    "prompt and whole conversations": {
        "prompt": ASKED,
        "chosen": ASKED + FOUR,
        "rejected": ASKED + FIVE,
    },
    "sharegpt": {"prompt": sharegpt(ASKED), "chosen": sharegpt(FOUR), "rejected": sharegpt(FIVE)},
    "parts": {"prompt": parts(ASKED), "chosen": parts(FOUR), "rejected": parts(FIVE)},
    "human and assistant": {
        "chosen": "\n\nHuman: 2 + 2?\n\nAssistant: 4",
        "rejected": "\n\nHuman: 2 + 2?\n\nAssistant: 5",
    },
    "scores": {"prompt": ASKED, "responses": [FIVE, FOUR], "scores": [1, 2]},
    "ranks": {"prompt": ASKED, "completions": [FOUR, FIVE], "ranks": [1, 2]},
    "objects": {
        "prompt": ASKED,
        "answers": [{"messages": FIVE, "rank": 3}, {"messages": FOUR, "rank": 1}],
    },
}

TEXTS: dict[str, dict[str, Any]] = {
    "texts": {"prompt": "2 + 2 =", "chosen": " 4", "rejected": " 5"},
    "shared words": {"chosen": "2 + 2 = 4", "rejected": "2 + 2 = 5"},
    "scored texts": {"prompt": "2 + 2 =", "responses": [" 5", " 4"], "scores": [1, 2]},
    "ranked texts": {
        "prompt": "2 + 2 =",
        "answers": [{"answer": " 5", "rank": 2}, {"answer": " 4", "rank": 1}],
    },
}


@pytest.mark.parametrize("shape", CONVERSATIONS)
def test_every_shape_of_a_conversation_is_the_same_pair(tmp_path: Path, shape: str) -> None:
    [pair] = pairs_of(tmp_path, CONVERSATIONS[shape])
    assert (pair.prompt, pair.chosen, pair.rejected, pair.ids) == (
        ({"role": "user", "content": "2 + 2?"},),
        ({"role": "assistant", "content": "4"},),
        ({"role": "assistant", "content": "5"},),
        None,
    )


@pytest.mark.parametrize("shape", TEXTS)
def test_every_shape_of_texts_is_the_same_pair(tmp_path: Path, shape: str) -> None:
    [pair] = pairs_of(tmp_path, TEXTS[shape])
    assert (pair.prompt, pair.chosen, pair.rejected, pair.ids) == ("2 + 2 =", " 4", " 5", None)


def test_a_table_of_texts_gives_the_same_pairs(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {**CHAT, "margin": 1.5, "prompt": json.dumps(CHAT["prompt"])},
        {**PLAIN, "margin": ""},
    ]
    with (tmp_path / "d.csv").open("w", newline="") as opened:
        table = csv.DictWriter(opened, ["prompt", "chosen", "rejected", "margin"])
        table.writeheader()
        for row in rows:
            cells = {n: json.dumps(v) if isinstance(v, list) else v for n, v in row.items()}
            table.writerow(cells)
    pairs = list(preferences(DataSource(str(tmp_path / "d.csv")), DataReport()))
    expected = [to_preference({**CHAT, "margin": 1.5}, ""), to_preference(PLAIN, "")]
    assert [repr(replace(pair, where="")) for pair in pairs] == list(map(repr, expected))


@pytest.mark.parametrize(("fence", "count"), [("jsonl", 12), ("json", 3)])
def test_every_documented_row_is_read(tmp_path: Path, fence: str, count: int) -> None:
    blocks = re.findall(rf"```{fence}\n(.+?)```", DOCUMENT.read_text(), re.DOTALL)
    path = tmp_path / "d.jsonl"
    path.write_text("".join(blocks))
    source, report = DataSource(str(path)), DataReport()
    rows = list((preferences if fence == "jsonl" else prompts)(source, report))
    assert len(rows) == report.sources[str(path)].read == count
