"""The benchmark of tokenising compares what it says; no test asserts a timing."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from tests.benchmarks.test_benchmarks import FOLDER, load
from tpmm_pl.data.table import as_table
from tpmm_pl.types import Pair

pytest.importorskip("trl")

script = load("tokenising")


@pytest.fixture(scope="module")
def drawn() -> tuple[list[Any], Any]:
    speech = script.Speech(0)
    tokenizer = script.train_tokenizer(speech)
    return script.draw_rows(60, speech, tokenizer), tokenizer


def test_the_tokenizer_has_its_vocabulary_and_its_template(drawn: tuple[list[Any], Any]) -> None:
    _, tokenizer = drawn
    assert len(tokenizer) == script.VOCABULARY
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "a"}], tokenize=False, add_generation_prompt=True
    )
    assert text == "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n"


def test_conversations_repeat_with_their_seed_and_share_a_system_prompt(
    drawn: tuple[list[Any], Any],
) -> None:
    _, tokenizer = drawn
    made = [script.draw_rows(5, script.Speech(seed), tokenizer) for seed in (0, 0, 1)]
    assert made[0] == made[1] != made[2]
    for row in made[0]:
        roles = [turn["role"] for turn in row["prompt"]]
        assert roles[0] == "system"
        assert roles[1:] == [("user", "assistant")[at % 2] for at in range(len(roles) - 1)]
        assert roles[-1] == "user"
        assert row["prompt"][0] == made[0][0]["prompt"][0]


def test_drawn_pairs_have_lengths_like_hhs(drawn: tuple[list[Any], Any]) -> None:
    lengths = script.Ours(*drawn).tokens().lengths()
    # bounds of the drawn lengths, the system prompt, a tenth for rounding, 5 tokens a turn
    assert 60 <= min(lengths["prompt_ids"]) <= max(lengths["prompt_ids"]) <= 600
    assert 8 <= min(lengths["chosen_ids"]) <= max(lengths["chosen_ids"]) <= 175


def test_both_ways_have_the_same_tokens_and_batches(drawn: tuple[list[Any], Any]) -> None:
    rows, tokenizer = drawn
    ours, theirs = script.Ours(rows[:10], tokenizer), script.Trls(rows[:10], tokenizer)
    table, made = ours.tokens(), theirs.tokens()
    assert script.equal_pairs(table, made, tokenizer.eos_token_id) == 10
    assert ours.batches(table) == theirs.batches(made) == 3
    assert script.equal_pairs(table[::-1], made, tokenizer.eos_token_id) == 0
    assert script.equal_pairs(table[:9], made, tokenizer.eos_token_id) == 0


def test_only_what_is_behind_the_end_may_differ() -> None:
    assert script.up_to_end([5, 1, 6, 1, 7, 8], 1) == (5, 1, 6, 1)
    assert script.up_to_end([5, 6], 1) == (5, 6)
    table = as_table([Pair("p", "", "", "", (5,), (6, 1), (7, 1))])
    row = {"prompt_ids": [5], "chosen_ids": [6, 1, 9], "rejected_ids": [7, 1]}
    assert script.equal_pairs(table, Dataset.from_list([row]), 1) == 1
    assert script.equal_pairs(table, Dataset.from_list([{**row, "rejected_ids": [8, 1]}]), 1) == 0


def test_ratios_are_medians_of_repeats() -> None:
    ours = script.Seconds(tokens=[1.0, 1.0, 2.0], batches=[0.5, 1.0, 1.0])
    theirs = script.Seconds(tokens=[3.0, 5.0, 4.0], batches=[1.5, 1.0, 3.0])
    table, ratios = script.table_text(ours, theirs)
    assert ratios == {"rows_to_tokens": 3.0, "batches_of_4": 3.0, "both": 3.0}
    # a share is one of the median of 4.5, 6 and 7 seconds
    assert "| rows to tokens | 0.67 | 0.17 | 3.00 | 2.00 - 5.00 |" in table
    assert "| both | 1.00 | 0.33 | 3.00 | 2.33 - 3.00 | at least 3.0: met |" in table


def test_a_file_is_read_in_the_shape_that_both_take(tmp_path: Path) -> None:
    said = {name: [{"role": "user", "content": name}] for name in ("prompt", "chosen", "rejected")}
    path = tmp_path / "d.jsonl"
    path.write_text(json.dumps({**said, "score": 1}) + "\n" + json.dumps(said) + "\n")
    assert script.read_rows(path, 1) == [said]


@pytest.mark.slow
def test_the_quick_form_writes_ratios_and_settings(tmp_path: Path) -> None:
    out, page = tmp_path / "out.json", tmp_path / "page.md"
    page.write_text("<!-- tokenising_quick -->\n<!-- /tokenising_quick -->\n")
    command = [sys.executable, str(FOLDER / "tokenising.py"), "--quick", "--json", str(out)]
    done = subprocess.run(
        [*command, "--write", str(page)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    written = json.loads(out.read_text(encoding="utf-8"))
    assert set(written["ratios"]) == {"rows_to_tokens", "batches_of_4", "both"}
    assert written["settings"]["same"] == written["settings"]["pairs"] == 300
    assert "300 pairs, 300 of them with the same tokens" in page.read_text(encoding="utf-8")
