"""What prompts and completions say does not reach a page that a browser shows."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tests.models.tiny import WORDS, tiny_llama, tiny_tokenizer
from tpmm_pl.cli import main
from tpmm_pl.data.pairs import read_pairs
from tpmm_pl.models.card import CARD
from tpmm_pl.trajectory import TrajectoryStore

pytestmark = pytest.mark.filterwarnings("ignore:.*fusion:UserWarning", "ignore:.*trains on")

SCRIPT = "<script>alert(1)</script>"


def test_no_page_of_a_run_quotes_prompts_or_completions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy, file, run = (tmp_path / name for name in ("policy", "pairs.jsonl", "run"))
    tiny_llama().save_pretrained(policy)
    tiny_tokenizer().save_pretrained(policy)
    rows = [
        {"prompt": f"{SCRIPT} {a} {b}", "chosen": f"{b} {SCRIPT}", "rejected": f"{SCRIPT} {a}"}
        for a, b in zip(WORDS, WORDS[3:], strict=False)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = [
        "fit", "--config", "configs/preferences.yaml", "--model.policy.name_or_path", policy,
        "--data.train", file, "--data.cache_dir", tmp_path / "cache", "--data.batch_size", 4,
        "--model.rounds", 1, "--reference.fusion.steps", 2, "--reference.fusion.batch_size", 2,
        "--trainer.accelerator", "cpu", "--trainer.default_root_dir", run,
    ]  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["tpmm", *map(str, flags)])
    main()
    store = TrajectoryStore(run / "trajectory")
    trained = read_pairs(store.path(str(store.record(0).pairs)))
    assert all(SCRIPT in pair.prompt and SCRIPT in pair.chosen for pair in trained)
    cards = list(run.rglob(CARD))
    assert {card.parent.name for card in cards} == {"last", "merged", "best"}
    pages = [path for path in run.rglob("*") if path.suffix in (".md", ".html", ".svg")]
    assert set(pages) == set(cards)
    assert not any("script" in page.read_text(encoding="utf-8") for page in pages)
