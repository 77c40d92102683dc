"""The comparisons with TRL compute what they say; no test asserts a timing."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from functools import partial
from importlib import import_module
from math import log
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.benchmarks.test_benchmarks import FOLDER, fusion, load
from tests.models.tiny import tiny_tokenizer
from tpmm_pl.data.packing import pair_rows

pytest.importorskip("trl")

hh, alternating = load("hh_pairs"), load("alternating")
dpo, reward = load("dpo_vs_trl"), load("reward_vs_trl")
steps: Any = import_module("trl_steps")  # as the scripts import it

TINY = fusion.Shape(hidden=16, layers=2, heads=2, kv_heads=1, ffn=32, vocabulary=64)
BATCHES, SIZE = 3, 2


@pytest.fixture(autouse=True)
def _large_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    # losses that leave log 2 within three steps
    monkeypatch.setitem(steps.SETTINGS, "learning_rate", 1e-2)
    monkeypatch.setattr(dpo, "RATE", 1e-2)
    monkeypatch.setattr(reward, "RATE", 1e-2)


@pytest.fixture(scope="module")
def work() -> Any:
    make_model = partial(fusion.random_llama, TINY)
    pairs = hh.draw_pairs(BATCHES * SIZE, TINY.vocabulary)
    return dpo.scored_work(pairs, make_model, SIZE)


def test_drawn_pairs_have_the_promised_tokens_and_repeat() -> None:
    pairs = hh.draw_pairs(300, 64)
    assert pairs[:100] == hh.draw_pairs(100, 64)
    assert {pair.prompt_ids[:30] for pair in pairs} == {pairs[0].prompt_ids[:30]}
    assert all(70 <= len(pair.prompt_ids) <= 430 for pair in pairs)
    completions = [ids for pair in pairs for ids in (pair.chosen_ids, pair.rejected_ids)]
    assert all(10 <= len(ids) <= 150 for ids in completions)
    assert all(ids[-1] == hh.END and hh.END not in ids[:-1] for ids in completions)
    assert all(len(prompt) + len(ids) <= 512 for prompt, ids in pair_rows(pairs))
    lengths = sorted(len(ids) for ids in completions)
    assert sum(lengths) / len(lengths) > lengths[len(lengths) // 2], "skewed: some are long"


def test_a_long_prompt_leaves_room_within_512_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hh, "PROMPTS", hh.Lengths(400, 0.0, 40, 400))
    monkeypatch.setattr(hh, "COMPLETIONS", hh.Lengths(150, 0.0, 10, 150))
    (pair,) = hh.draw_pairs(1, 64)
    assert len(pair.prompt_ids) == 430
    assert len(pair.chosen_ids) == len(pair.rejected_ids) == 82


def test_nine_of_ten_batches_of_drawn_pairs_are_within_the_stated_tokens() -> None:
    batches = hh.in_batches(hh.draw_pairs(1600, 64), 4)
    counts = [hh.count_tokens(pair_rows(batch)) for batch in batches]
    assert sum(1410 <= count.padded <= 3550 for count in counts) == pytest.approx(360, abs=15)
    assert sum(570 <= count.unique <= 1110 for count in counts) == pytest.approx(360, abs=15)


def test_completions_of_a_prompt_share_it() -> None:
    rows, other = hh.draw_completions(2, 8, 64)
    assert len(rows) == len(other) == 8
    assert len({prompt for prompt, _ in rows}) == 1
    assert len({completion for _, completion in rows}) == 8


def test_tokens_of_a_batch_counted_by_hand() -> None:
    # 1 2 3 | 4,  1 2 3 | 5 6,  1 2 7 8 | 9: the tree is 1 2, 3, 4, 5 6, 7 8 9
    rows = [((1, 2, 3), (4,)), ((1, 2, 3), (5, 6)), ((1, 2, 7, 8), (9,))]
    assert hh.count_tokens(rows) == (15, 14, 9, 4)
    assert hh.unused_token(rows) == 0
    assert hh.unused_token([((0, 1), (3,))]) == 2


def test_the_typical_batch_has_the_median_of_the_padded_tokens() -> None:
    def rows(length: int) -> Any:
        return [((1,) * length, (2,))]

    assert hh.typical([rows(5), rows(9), rows(7)]) == 2


def test_pairs_of_a_file_are_cut_to_512_tokens(tmp_path: Path) -> None:
    row = {"prompt": "w0 " * 500, "chosen": "w1 " * 20, "rejected": "w3"}
    filled = {**row, "prompt": "w0 " * 600}
    file = tmp_path / "pairs.jsonl"
    file.write_text("\n".join(map(json.dumps, [row, filled, row, row])), encoding="utf-8")
    pairs = hh.read_pairs(file, tiny_tokenizer(template=False), 2)
    assert [len(prompt) + len(ids) for prompt, ids in pair_rows(pairs)] == [512, 512, 502, 502]


def test_two_ways_take_turns_in_going_first() -> None:
    calls: list[tuple[str, int]] = []

    def step(name: str, number: int) -> float:
        calls.append((name, number))
        return {"ours": 1.0, "other": 1.0 + number / 4}[name]

    found = alternating.alternate(partial(step, "ours"), partial(step, "other"), 3, 2)
    assert calls[:2] == [("ours", 2), ("other", 2)], "counted, not timed"
    assert calls[2:] == [
        *(("ours", 0), ("other", 0)),
        *(("other", 1), ("ours", 1)),
        *(("ours", 2), ("other", 2)),
    ]
    assert len(found.ours.seconds) == len(found.other.seconds) == 3
    assert found.loss_difference() == 0.5


def test_ratios_are_of_the_same_batch_and_share_the_reference_pass() -> None:
    ours, other = alternating.Measured([1.0, 2.0]), alternating.Measured([4.0, 10.0])
    found = alternating.Compared(ours, other)
    assert found.ratios() == [4.0, 5.0]
    assert found.ratios(ours_more=1.0, other_more=2.0) == [3.0, 4.0]
    assert found.ratio_of_totals() == 14 / 3


def test_what_is_missed_is_said() -> None:
    assert alternating.at_least(4.9, 5.0) == "at least 5.0: NOT MET"
    assert alternating.at_least(5.0, 5.0) == "at least 5.0: met"
    assert alternating.at_most(0.23, 0.22) == "at most 0.22: NOT MET"
    assert alternating.at_most(0.22, 0.22) == "at most 0.22: met"
    assert alternating.at_least(9.0, None) == ""
    assert alternating.agreement(9e-6) == "9e-06"
    assert alternating.agreement(2e-5) == "2e-05 (NOT EQUAL)"


def test_products_in_place_and_attention_on_the_cpu_are_counted() -> None:
    a, b, c = torch.zeros(3, 4), torch.zeros(4, 5), torch.zeros(3, 5)
    assert alternating.operations(lambda: c.addmm_(a, b)) == 2 * 3 * 4 * 5
    assert alternating.operations(lambda: torch.mm(a, b, out=c)) == 2 * 3 * 4 * 5
    q = torch.zeros(1, 2, 6, 8, requires_grad=True)
    attention = partial(torch.nn.functional.scaled_dot_product_attention, q, q, q)
    # two products of 2 heads, 6 x 6 scores, width 8; five more in the backward pass
    product = 2 * 2 * 6 * 6 * 8
    assert alternating.operations(attention) == 2 * product
    assert alternating.operations(lambda: attention().sum().backward()) == 7 * product


@pytest.mark.parametrize("name", list(dpo.ARMS))
def test_every_variant_of_trl_has_our_losses(name: str, work: Any) -> None:
    variant = dpo.ARMS[name]
    arm = dpo.measure_arm(variant, work)
    assert len(arm.found.other.losses) == BATCHES
    assert max(abs(loss - log(2)) for loss in arm.found.ours.losses) > 0.01
    assert arm.found.loss_difference() <= 1e-5
    assert (arm.trl_reference > 0) == variant.precomputed
    assert arm.found.ours.operations < arm.found.other.operations
    cells, ratios = dpo.arm_row(name, arm, 1e9)
    assert cells[-1] == "at least 1000000000.0: NOT MET"
    assert ratios[f"dpo_{name}"] > 0


def test_trl_pads_as_many_tokens_as_are_counted(work: Any) -> None:
    for name in ("trl", "grouped"):
        trl = dpo.trl_step(dpo.ARMS[name], work.make_model(), work)
        batches = [[work.pairs[index] for index in part] for part in trl.order]
        assert trl.padded == [hh.count_tokens(pair_rows(batch)).padded for batch in batches]
        assert sorted(itertools.chain(*trl.order)) == list(range(BATCHES * SIZE))


def test_a_compact_head_works_less_and_only_where_it_is_asked_for(work: Any) -> None:
    trl, compact = (dpo.trl_step(dpo.ARMS[n], work.make_model(), work) for n in ("trl", "compact"))
    counts = [alternating.operations(partial(step, 0)) for step in (compact, trl)]
    assert counts[0] < counts[1]
    assert alternating.operations(partial(trl, 0)) == counts[1], "the patch went away"


def test_grouping_by_length_pads_less() -> None:
    pairs = hh.draw_pairs(200, 64)
    grouped = steps.grouped_by_length(pairs, 4)
    assert sorted(p.prompt_id for batch in grouped for p in batch) == sorted(
        p.prompt_id for p in pairs
    )
    padded = [
        sum(hh.count_tokens(pair_rows(batch)).padded for batch in batches)
        for batches in (grouped, hh.in_batches(pairs, 4))
    ]
    assert padded[0] < 0.8 * padded[1]


def test_lora_trains_adapters_only_and_both_sides_start_alike(work: Any) -> None:
    ours, trl = dpo.build(dpo.ARMS["lora"], work)
    theirs = dict(trl.trainer.model.named_parameters())
    for name, parameter in ours.scorer.model.named_parameters():
        assert parameter.requires_grad == theirs[name].requires_grad == ("lora_" in name)
        assert torch.equal(parameter, theirs[name])


def test_a_reward_step_has_the_loss_of_trl() -> None:
    pairs = hh.draw_pairs(BATCHES * SIZE, TINY.vocabulary)
    found, rows = reward.compare_steps(partial(reward.random_reward_model, TINY), pairs, SIZE)
    assert len(rows) == len(found.other.losses) == BATCHES
    assert max(abs(loss - log(2)) for loss in found.ours.losses) > 0.01
    assert found.loss_difference() <= 1e-5
    assert found.ours.operations < found.other.operations


def test_answers_score_alike_in_a_tree_and_in_padded_rows() -> None:
    prompts = hh.draw_completions(2, 8, TINY.vocabulary)
    model = reward.random_reward_model(TINY).eval()
    trees, padded = reward.TreeScores(model, prompts), reward.PaddedScores(model, prompts, hh.PAD)
    for number in range(2):
        assert trees(number) == pytest.approx(padded(number), abs=1e-6)
        assert trees.scores[number].shape == (8,)
        torch.testing.assert_close(
            trees.scores[number], padded.scores[number], atol=1e-6, rtol=1e-5
        )


def test_a_file_of_pairs_needs_a_tokenizer(tmp_path: Path) -> None:
    command = [sys.executable, str(FOLDER / "dpo_vs_trl.py"), "--pairs", str(tmp_path / "p.jsonl")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "needs --model" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "more", "expected"),
    [
        (
            "dpo_vs_trl",
            ["--arms", "trl", "precomputed"],
            ["dpo_trl", "dpo_memory_longest_over_leanest"],
        ),
        ("reward_vs_trl", [], ["reward_step", "reward_scores_tokens"]),
    ],
)
def test_the_quick_form_writes_tables_ratios_and_settings(
    script: str, more: list[str], expected: list[str], tmp_path: Path
) -> None:
    out, page = tmp_path / "out.json", tmp_path / "page.md"
    module = dpo if script == "dpo_vs_trl" else reward
    names = [f"{script}_{part}_quick" for part in module.PARTS]
    page.write_text("".join(f"<!-- {name} -->\n<!-- /{name} -->\n" for name in names))
    command = [sys.executable, str(FOLDER / f"{script}.py"), "--quick", "--batches", "2"]
    command += ["--batch_size", "1", "--json", str(out), "--write", str(page), *more]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    written = json.loads(out.read_text(encoding="utf-8"))
    assert set(written) == {"ratios", "settings"}
    assert all(written["ratios"][name] > 0 for name in expected)
    assert written["settings"]["quick"] is True
    assert page.read_text(encoding="utf-8").count("| --- |") >= len(names)
    assert "NOT EQUAL" not in done.stdout
