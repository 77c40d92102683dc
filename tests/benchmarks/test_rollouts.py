"""The benchmark of sampling runs in its quick form and counts what it says."""

from __future__ import annotations

import json
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.benchmarks.test_benchmarks import FOLDER, load

rollouts = load("rollouts")
TINY = rollouts.Shape(hidden=16, layers=1, heads=2, kv_heads=1, ffn=32, vocabulary=64)


def measured(ends: list[int] | None) -> tuple[Any, Any, list[Any]]:
    model = rollouts.random_llama(TINY)
    model.generation_config.eos_token_id = ends
    options = Namespace(samples=3, max_new_tokens=5)
    ours, peer = rollouts.Ours(model, options), rollouts.Generate(model, options)
    batch = rollouts.draw_prompts(4, TINY.vocabulary, 0)
    torch.manual_seed(0)
    mine, theirs = rollouts.alternate(model, [ours, peer], [batch])
    assert rollouts.logps_error(model, ours.completions) < 1e-4
    return mine, theirs, batch


def test_without_ends_both_make_as_many_tokens_and_ours_prefills_each_prompt_once() -> None:
    mine, theirs, batch = measured(None)
    longest = max(len(prompt.ids) for prompt in batch)
    assert mine.made == theirs.made == [4 * 3 * 5]
    # the last token of a completion is not read
    assert [(p.prefill, p.steps) for p in mine.passed] == [(4 * longest, 4 * 3 * 4)]
    assert [(p.prefill, p.steps) for p in theirs.passed] == [(4 * 3 * longest, 4 * 3 * 4)]


def test_with_ends_ours_decodes_rows_that_go_on_alone() -> None:
    mine, theirs, _ = measured(rollouts.end_ids(TINY.vocabulary, 4))
    (made,), (passed,) = mine.made, mine.passed
    assert passed.steps < made < 4 * 3 * 5
    assert theirs.made[0] < theirs.passed[0].steps + 4 * 3


def test_tokens_count_up_to_the_first_end() -> None:
    rows = torch.tensor([[5, 1, 7, 1], [1, 5, 5, 5], [5, 6, 7, 8], [5, 6, 7, 1]])
    assert rollouts.tokens_made(rows, [1]) == 2 + 1 + 4 + 4
    assert rollouts.tokens_made(rows, []) == 16


@pytest.mark.slow
def test_the_quick_form_prints_its_table(tmp_path: Path) -> None:
    out, page = tmp_path / "out.json", tmp_path / "page.md"
    page.write_text("a\n<!-- rollouts_quick -->\n<!-- /rollouts_quick -->\nb\n")
    command = [sys.executable, str(FOLDER / "rollouts.py"), "--quick", "--json", str(out)]
    command += ["--write", str(page)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    written = json.loads(out.read_text(encoding="utf-8"))
    assert set(written) == {"ratios", "settings"}
    assert written["ratios"]["tokens_a_second_over_generate_none"] > 0
    assert written["settings"]["quick"] is True
    assert done.stdout.strip() in page.read_text()
