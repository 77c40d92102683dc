"""Broken data gives a sentence or a result: never another error, never a row that is lost."""

from __future__ import annotations

import csv
import gzip
import json
from pathlib import Path
from random import Random
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tpmm_pl.data.rows.formats import preferences, prompts
from tpmm_pl.data.rows.report import DataReport
from tpmm_pl.data.rows.sources import DataSource
from tpmm_pl.types import InputError

ROWS_A_FILE = 10
ROWS, FILES = 1400, 600  # a row is read from three kinds of file

U, A, B = (
    {"role": r, "content": c} for r, c in (("user", "hi"), ("assistant", "a"), ("assistant", "b"))
)
TEXTS: dict[str, Any] = {
    "prompt": "2 + 2 =",
    "chosen": " 4",
    "rejected": " 5",
    "margin": 1.5,
    "weight": 2.0,
}
CHAT: dict[str, Any] = {"prompt": [U], "chosen": [A], "rejected": [B], "system": "kind"}
SHAPES: list[dict[str, Any]] = [
    TEXTS,
    CHAT,
    {"chosen": [U, A], "rejected": [U, B], "prompt": "hi", "score_chosen": 1, "score_rejected": 0},
    {"chosen": "\n\nHuman: hi\n\nAssistant: a", "rejected": "\n\nHuman: hi\n\nAssistant: b"},
    {"chosen": "the sky is blue", "rejected": "the sky is red"},
    {"prompt": "p", "responses": ["a", "b", "c"], "scores": [1, 3, 2]},
    {"prompt": [U], "answers": [{"messages": [A], "rank": 1}, {"messages": [B], "rank": 2}]},
    {"prompt_ids": [1, 2], "chosen_ids": [3], "rejected_ids": [4, 5]},
    {
        **CHAT,
        "tools": [{"type": "function", "function": {"name": "f"}}],
        "ref_chosen_logps": -1.0,
        "ref_rejected_logps": -2.0,
    },
    {
        "prompt": [{"from": "human", "value": "hi"}],
        "chosen": [{"from": "gpt", "value": "a"}],
        "rejected": [{"from": "gpt", "value": "b"}],
    },
    {
        "prompt": [U],
        "chosen": [
            {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f"}}]}
        ],
        "rejected": [B],
    },
    {"messages": [U, A]},
]
ODDITIES: list[Any] = [
    None,
    True,
    0,
    -1,
    10**30,
    1e308,
    float("nan"),
    float("inf"),
    "",
    " ",
    "x",
    "é\ud800",
    "[",
    "[]",
    '[{"role": "user"}]',
    "\x00",
    [],
    [[]],
    {},
    {"role": "user"},
    [{}],
    ["x", 1],
    {"type": "text"},
    "\n\nHuman: \n\nAssistant: ",
]


def mutated(value: Any, random: Random) -> Any:
    """Change, delete or swap one thing at random, anywhere inside."""
    if isinstance(value, dict | list) and value and random.random() < 0.75:
        key = (
            random.choice(list(value)) if isinstance(value, dict) else random.randrange(len(value))
        )
        changed: Any = value.copy()
        if random.random() < 0.25:
            del changed[key]
        elif random.random() < 0.2:
            other = random.choice(list(value) if isinstance(value, dict) else range(len(value)))
            changed[key], changed[other] = changed[other], changed[key]
        else:
            changed[key] = mutated(value[key], random)
        return changed
    if isinstance(value, str) and value and random.random() < 0.3:
        at = random.randrange(len(value))
        return (
            value[:at]
            + random.choice(["", "\n", "\u2028", "\ud800", '"', "Human:"])
            + value[at + 1 :]
        )
    return random.choice(ODDITIES)


def damaged(content: bytes, random: Random) -> bytes:
    """Flip, delete or insert some bytes, or cut the end off."""
    changed = bytearray(content)
    for _ in range(random.choice([1, 1, 1, 3, 10])):
        at = random.randrange(max(len(changed), 1))
        kind = random.randrange(4)
        if kind == 0:
            changed[at : at + 1] = bytes([random.randrange(256)])
        elif kind == 1:
            del changed[at : at + random.choice([1, 2, 20])]
        elif kind == 2:
            changed[at:at] = bytes(random.choices(range(256), k=random.choice([1, 4])))
        elif random.random() < 0.3:
            del changed[at:]
    return bytes(changed)


def outcome(path: Path, rows: int | None) -> str:
    """Read pairs and prompts; check that the counts add up, and to ``rows`` where it is known."""
    ends = []
    for read in (preferences, prompts):
        report, kept = DataReport(max_bad_rows=10_000), 0
        try:
            for _ in read(DataSource(str(path)), report):
                kept += 1
        except InputError as error:
            sentence = str(error)
            ends.append("sentence")
        else:
            sentence = ""
            ends.append("result")
        assert "\n" not in sentence
        assert len(sentence) < 3_000
        if sentence and "holds no" not in sentence:
            continue
        counts = report.sources.get(str(path))
        found = 0 if counts is None else counts.read
        if counts is not None:
            assert found == kept + counts.dropped.total() + len(counts.bad)
        assert rows is None or found == rows
        report.table()
    return ends[0]


@pytest.mark.parametrize("seed", range(7))
def test_mutated_rows_are_read_or_named(tmp_path: Path, seed: int) -> None:
    random = Random(seed)
    ends = set()
    for _ in range(ROWS // 7 // ROWS_A_FILE):
        rows = [random.choice(SHAPES) for _ in range(ROWS_A_FILE)]
        for _ in range(random.choice([1, 2, 3])):
            rows = [mutated(row, random) for row in rows]
        path = tmp_path / "d.jsonl"
        # surrogates are escaped: JSON can say them, UTF-8 cannot
        path.write_text("\n".join(json.dumps(row) for row in rows))
        ends.add(outcome(path, ROWS_A_FILE))
        path = tmp_path / "d.json"
        path.write_text(json.dumps(rows))
        ends.add(outcome(path, ROWS_A_FILE))
        with (tmp_path / "d.csv").open("w", newline="") as opened:
            table = csv.DictWriter(
                opened,
                sorted({str(k) for row in rows if isinstance(row, dict) for k in row} | {"x"}),
            )
            table.writeheader()
            count = 0
            for row in rows:
                if isinstance(row, dict):
                    count += 1
                    table.writerow(
                        {
                            k: v if isinstance(v, str) and v.isprintable() else json.dumps(v)
                            for k, v in row.items()
                        }
                        | {"x": 1}
                    )
        ends.add(outcome(tmp_path / "d.csv", count))
    assert "result" in ends


def intact_files(folder: Path) -> dict[str, bytes]:
    """Return one sound file of every kind, ten rows each."""
    lines = "\n".join(json.dumps(SHAPES[i % len(SHAPES)]) for i in range(ROWS_A_FILE)).encode()
    (folder / "t.csv").write_text("prompt,chosen,rejected,margin\n" + '"2 + 2 =",4,"5, 6",1\n' * 10)
    pq.write_table(pa.Table.from_pylist([CHAT | {"weight": 1.0}] * 10), folder / "c.parquet")
    pq.write_table(pa.Table.from_pylist([TEXTS] * 10), folder / "t.parquet", compression="none")
    return {
        "d.jsonl": lines,
        "d.jsonl.gz": gzip.compress(lines),
        "d.json": b"[" + lines.replace(b"\n", b",\n") + b"]",
        **{name: (folder / name).read_bytes() for name in ("t.csv", "c.parquet", "t.parquet")},
    }


def rows_that_stand_in(path: Path, content: bytes) -> int | None:
    """Count rows by a way of its own, where the damage leaves one."""
    if path.name.endswith(".jsonl"):
        return sum(1 for line in content.split(b"\n") if line.strip())
    return None


@pytest.mark.parametrize("seed", range(6))
def test_damaged_files_are_read_or_named(tmp_path: Path, seed: int) -> None:
    random = Random(100 + seed)
    name, content = list(intact_files(tmp_path).items())[seed]
    path = tmp_path / name
    ends = []
    for _ in range(FILES // 6):
        broken = damaged(content, random)
        path.write_bytes(broken)
        ends.append(outcome(path, rows_that_stand_in(path, broken)))
    path.write_bytes(content)
    assert outcome(path, ROWS_A_FILE) == "result"
    assert "sentence" in ends
