from __future__ import annotations

import json
import pickle
from collections import Counter
from pathlib import Path

import pytest

from tpmm_pl.data.rows.report import DataReport
from tpmm_pl.types import InputError


def filled() -> DataReport:
    report = DataReport(max_bad_rows=2)
    report.read("train.jsonl", 10)
    report.read("eval.csv")
    report.drop("train.jsonl", "chosen and rejected identical", 2)
    report.cut("train.jsonl", "prompts cut off")
    report.bad(InputError("train.jsonl, line 3: not JSON"), "train.jsonl")
    return report


def test_the_table_has_one_aligned_line_a_source_and_reason() -> None:
    assert filled().table() == (
        "source       what                                    rows\n"
        "train.jsonl  read                                      10\n"
        "train.jsonl  dropped: chosen and rejected identical     2\n"
        "train.jsonl  cut: prompts cut off                       1\n"
        "train.jsonl  bad, skipped                               1\n"
        "train.jsonl  kept                                       7\n"
        "eval.csv     read                                       1\n"
        "eval.csv     kept                                       1"
    )
    assert DataReport().table() == ""


def test_the_written_record_has_the_sentences(tmp_path: Path) -> None:
    filled().write(tmp_path / "run" / "data.json")
    assert json.loads((tmp_path / "run" / "data.json").read_text()) == {
        "max_bad_rows": 2,
        "sources": {
            "train.jsonl": {
                "read": 10,
                "dropped": {"chosen and rejected identical": 2},
                "cut": {"prompts cut off": 1},
                "bad": ["train.jsonl, line 3: not JSON"],
            },
            "eval.csv": {"read": 1, "dropped": {}, "cut": {}, "bad": []},
        },
    }


def test_a_sentence_that_is_no_utf_8_is_written_all_the_same(tmp_path: Path) -> None:
    report = DataReport(max_bad_rows=1)
    report.bad(InputError("half a character: \ud800"), "a")
    report.write(tmp_path / "data.json")
    record = json.loads((tmp_path / "data.json").read_text())
    assert record["sources"]["a"]["bad"] == ["half a character: \ud800"]


def test_one_bad_row_too_many_is_an_error_that_names_the_way_out() -> None:
    report = DataReport(max_bad_rows=1)
    report.bad(InputError("a, line 1: first"), "a")
    with pytest.raises(InputError, match=r"^b, line 2: second; .* --data\.max_bad_rows, now 1,"):
        report.bad(InputError("b, line 2: second"), "b")
    with pytest.raises(InputError, match=r"^first; this is bad row 1: raise .*, now 0, to skip"):
        DataReport(0).bad(InputError("first"), "a")
    with pytest.raises(InputError, match=r"^first$"):
        DataReport().bad(InputError("first"), "a")
    with pytest.raises(InputError, match=r"max_bad_rows is -1; give 0 or more"):
        DataReport(-1)


def test_reports_of_two_processes_add_up() -> None:
    report, other = filled(), pickle.loads(pickle.dumps(filled()))
    other.drop("eval.csv", "ties")
    report.merge(other)
    assert report.sources["train.jsonl"].read == 20
    assert report.dropped("train.jsonl") == Counter({"chosen and rejected identical": 4})
    assert report.dropped("eval.csv") == {"ties": 1}
    assert len(report.sources["train.jsonl"].bad) == 2
    other.bad(InputError("the fourth"), "eval.csv")
    other.sources["train.jsonl"].bad = ["the third"]
    with pytest.raises(InputError, match=r"^the third; this is bad row 3: raise .*, now 2,"):
        report.merge(other)


def test_dropped_is_a_copy() -> None:
    report = filled()
    report.dropped("train.jsonl")["other"] += 1
    assert "other" not in report.dropped("train.jsonl")
