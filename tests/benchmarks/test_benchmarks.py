"""The benchmarks run in their quick forms and compute what they say; no test asserts a timing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from argparse import Namespace
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.models.tiny import tiny_llama
from tpmm_pl.data.batching import collate
from tpmm_pl.models.scoring import score_pairs
from tpmm_pl.trajectory import Record, TrajectoryStore
from tpmm_pl.types import PairBatch, PairLogps

FOLDER = Path(__file__).parents[2] / "benchmarks"
# as for a script: what it shares with others lies beside it
sys.path.append(str(FOLDER))


def load(name: str) -> Any:
    """Import a script by its path: benchmarks are no package."""
    spec = spec_from_file_location(f"benchmark_{name}", FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


page = load("page")
quickstart, fusion = load("quickstart"), load("fusion")
moe, hacking = load("moe"), load("reward_hacking")


def test_stage_seconds_sum_over_records_and_leave_evaluation_out() -> None:
    records = [
        Record(0, seconds={"pairs": 1.0, "evaluate": 9.0}),
        Record(1, seconds={"train": 2.0, "pairs": 0.5, "ship": 9.0, "fuse": 0.25}),
    ]
    expected = {"train": 2.0, "snapshot": 0.0, "fuse_pairs": 0.0, "fuse": 0.25, "pairs": 1.5}
    assert quickstart.stage_seconds(records) == expected


def test_iterative_dpo_is_not_charged_for_fuse_pairs_in_the_first_ratio() -> None:
    last = {"train": 4.0, "snapshot": 0.0, "fuse_pairs": 1.0, "fuse": 0.0, "pairs": 4.0}
    learned = {"train": 4.0, "snapshot": 0.0, "fuse_pairs": 1.0, "fuse": 3.0, "pairs": 4.0}
    ratios = quickstart.rounds_ratios(last, learned)
    assert ratios["rounds_learned_over_last"] == 12 / 8
    assert ratios["rounds_learned_over_last_counting_its_fuse_pairs"] == 12 / 9


def test_stages_are_shown_as_shares_of_the_rounds_of_last() -> None:
    last = {"train": 4.0, "snapshot": 0.0, "fuse_pairs": 1.0, "fuse": 0.0, "pairs": 4.0}
    text = quickstart.table({"last": [last], "learned": [{**last, "fuse": 2.0}]}, {"r": 1.375})
    assert "| train | 0.50 | 0.50 |" in text
    assert "| fuse_pairs | (0.12) | 0.12 |" in text
    assert "| fuse | 0.00 | 0.25 |" in text
    assert "| r | 1.38 |" in text


def test_a_section_is_replaced_between_its_markers_only(tmp_path: Path) -> None:
    file = tmp_path / "page.md"
    file.write_text("before\n<!-- a -->\nold\n<!-- /a -->\nafter\n", encoding="utf-8")
    page.write_section(file, "a", "new")
    assert file.read_text(encoding="utf-8") == "before\n<!-- a -->\nnew\n<!-- /a -->\nafter\n"
    with pytest.raises(ValueError, match="no section <!-- b -->"):
        page.write_section(file, "b", "new")


def test_drawn_pairs_have_the_promised_lengths_and_repeat() -> None:
    pairs = fusion.draw_pairs(50, 64)
    assert pairs == fusion.draw_pairs(50, 64)
    assert all(40 <= len(pair.prompt_ids) <= 200 for pair in pairs)
    assert all(20 <= len(ids) <= 120 for p in pairs for ids in (p.chosen_ids, p.rejected_ids))
    assert all(0 < token < 64 for pair in pairs for token in pair.chosen_ids)


def test_a_step_is_compared_with_the_plain_steps_around_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = iter([1.0, 3.0, 5.0, 1.0, 8.0, 2.0])  # plain, a, b, plain, c, plain

    def seconds(step: Any, batch: PairBatch) -> tuple[float, float]:
        return next(clock), 0.5

    monkeypatch.setattr(fusion, "cpu_seconds", seconds)
    found = fusion.compare_times(None, {"a": None, "b": None, "c": None}, [None])
    assert [found[name].ratios for name in "abc"] == [[3.0], [5.0], [16 / 3]]
    assert found["a"].losses == [0.5]


def test_private_memory_is_read_in_bytes() -> None:
    assert page.private_bytes("VmRSS:\t 900 kB\nRssAnon:\t     120 kB\nRssFile:\t 7 kB\n") == 122880


def test_markdown_has_a_rule_below_its_header() -> None:
    assert page.markdown(["a", "b"], [["1", "2"]]) == "| a | b |\n| --- | --- |\n| 1 | 2 |"


def test_both_ways_have_the_loss_and_the_gradient_of_the_merge(tmp_path: Path) -> None:
    model = tiny_llama(tied=True)
    store = TrajectoryStore(tmp_path)
    fusion.write_snapshots(model, store, 3)
    found = fusion.compare_gradients(model, store, 3, _batch(model))
    assert found.losses[0] == pytest.approx(found.losses[1], abs=1e-6)
    assert max(found.errors) < 1e-3


def test_the_exact_gradient_sums_to_0_under_a_softmax(tmp_path: Path) -> None:
    model = tiny_llama(tied=True)
    store = TrajectoryStore(tmp_path)
    fusion.write_snapshots(model, store, 3)
    gradient: Tensor = fusion.exact_gradient(model, store, 3, _batch(model))
    assert gradient.shape == (3,)
    assert float(gradient.abs().max()) > 0
    torch.testing.assert_close(gradient.sum(), torch.zeros((), dtype=torch.float64))


def _batch(model: torch.nn.Module) -> PairBatch:
    # within the tiny model's 32 tokens and 128 positions
    pairs = [p for p in fusion.draw_pairs(40, 32) if len(p.prompt_ids) < 60][:2]
    logps = score_pairs(model, pairs)
    # away from the start, where the loss is log 2 and its slope the same for all pairs
    shifted = PairLogps(logps.chosen - 3, logps.rejected + 2)
    batch = collate(pairs)
    batch.reference = shifted
    return batch


def test_operations_of_a_mixture_are_those_of_its_active_experts() -> None:
    # 3 of 5 experts a token: the router's own product is 4 of 384 columns
    shape = moe.Shape(hidden=32, layers=1, heads=2, kv_heads=2, ffn=64, vocabulary=40)
    dense, mixture = moe.random_reward_model(shape), moe.upcycled(shape)
    call, others = moe.layer_variants(dense, mixture, 512, shape.hidden)
    (layer,) = others.values()
    router = 2 * 512 * 32 * 4
    assert moe.operations(layer) == 3 * moe.operations(call) + router


def test_a_consolidated_model_costs_what_the_dense_one_does() -> None:
    shape = moe.Shape(hidden=32, layers=2, heads=2, kv_heads=2, ffn=64, vocabulary=40)
    dense, mixture = moe.random_reward_model(shape), moe.upcycled(shape)
    call, others = moe.model_variants(dense, mixture, moe.consolidated(mixture), 512, 40)
    assert moe.operations(others["model, merged"]) == moe.operations(call)


@pytest.mark.parametrize("from_start", [False, True])
@pytest.mark.parametrize("arms", [list(hacking.ARMS), ["dense", "merge_learned"]])
def test_a_step_of_reward_training_needs_the_ones_before(arms: list[str], from_start: bool) -> None:
    made: set[str] = set()
    options = Namespace(arms=arms, from_start=from_start, reinitialise=0.0)
    for wave in hacking.trainings(options):
        assert all(one.start is None or one.start in made for one in wave)
        made |= {one.arm for one in wave}
    judges = [hacking.judge_settings(Path("r"))[arm][1] for arm in arms]
    used = {Path(str(s["name_or_path"])).parts[1] for s in judges if "name_or_path" in s}
    assert used - {"merge_uniform", "merge_unshared"} <= made


def test_arms_are_compared_seed_by_seed() -> None:
    found = {
        "dense": [{"best_of/4": 0.5}, {"best_of/4": 0.7}],
        "merge": [{"best_of/4": 0.6}, {"best_of/4": 0.9}],
    }
    # differences 0.1 and 0.2: mean 0.15, standard error 0.05
    assert "| merge | +0.150 (3.0) |" in hacking.differences(found, "dense")
    assert "| merge | 0.750 +- 0.212 |" in hacking.table(found)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "ratio"),
    [
        ("quickstart", "rounds_learned_over_last"),
        ("fusion", "fusion_over_plain_k8"),
        ("moe", "layer_mixture_seconds_512"),
    ],
)
def test_the_quick_form_writes_ratios_and_settings(script: str, ratio: str, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    command = [sys.executable, str(FOLDER / f"{script}.py"), "--quick", "--json", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ})
    assert done.returncode == 0, done.stderr
    written = json.loads(out.read_text(encoding="utf-8"))
    assert set(written) == {"ratios", "settings"}
    assert written["ratios"][ratio] > 0
    assert written["settings"]["quick"] is True
    assert "| --- |" in done.stdout.replace("|---|", "| --- |")
