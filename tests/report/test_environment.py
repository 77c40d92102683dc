from __future__ import annotations

from pathlib import Path

import torch

from tests.report.written_runs import config, gold, write_run
from tpmm_pl.models.card import policy_card
from tpmm_pl.report.environment import present_versions, recorded_versions
from tpmm_pl.report.runs import Run, read_runs
from tpmm_pl.types import Recipe


def with_card(run: Run, name: str) -> Path:
    file = run.path / "export" / name / "README.md"
    file.parent.mkdir(parents=True)
    facts = {"rounds": 1, "loss": "dpo"}
    card = policy_card(run.store, Recipe("last", (0,)), adapter=False, training=facts, metrics={})
    file.write_text(card, encoding="utf-8")
    return file


def test_versions_are_those_of_the_model_cards(tmp_path: Path) -> None:
    runs = read_runs([write_run(tmp_path / str(n), config(n), gold(0.5)) for n in (0, 1)])
    assert recorded_versions(runs) == {}
    with_card(runs[0], "last")
    with_card(runs[0], "best")
    older = with_card(runs[1], "last")
    now = torch.__version__
    older.write_text(older.read_text().replace(f"| torch | {now} |", "| torch | 2.6.0 |"))
    found = recorded_versions(runs)
    assert found["torch"] == [now, "2.6.0"]
    assert len(found["transformers"]) == 1
    assert "rounds" not in found


def test_versions_of_the_report_are_of_what_runs() -> None:
    assert present_versions()["torch"] == torch.__version__
