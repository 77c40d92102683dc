from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.callbacks.letters_run import (
    context_of,
    letters_data,
    letters_pairs,
    round_pairs,
    snapshots,
)
from tpmm_pl.callbacks import (
    ReferenceMerge,
    RoundContext,
    RoundEvaluation,
    TrajectorySnapshot,
    finish_round,
)
from tpmm_pl.data.pairs import read_pairs
from tpmm_pl.models.scoring import score_pairs
from tpmm_pl.noise import LabelNoise
from tpmm_pl.rounds import one_hot
from tpmm_pl.toy.judges import LettersGold, LettersProxy
from tpmm_pl.toy.start import LettersPolicy

MEASURED = ("gold", "proxy", "length", "kl/policy_sft")
COMPARED = ("win/sft", "win/previous", "accuracy")
DOMAINS = ("in_domain", "out_of_domain")


def evaluation(**settings: Any) -> RoundEvaluation:
    return RoundEvaluation(LettersGold(), LettersProxy(), max_new_tokens=6, **settings)


def finish_all(context: RoundContext, *callbacks: Any) -> None:
    """Finish every round of a trajectory of snapshots."""
    for index in range(context.round_index + 1):
        final = index == context.round_index
        of_round = RoundContext(
            context.policy, context.store, index, data=context.data, final=final
        )
        finish_round(list(callbacks), of_round)


@pytest.fixture(scope="module")
def measured(start: LettersPolicy, tmp_path_factory: pytest.TempPathFactory) -> RoundContext:
    context = snapshots(tmp_path_factory.mktemp("measured"), start, 2)
    finish_all(context, ReferenceMerge("uniform"), evaluation())
    return context


def test_a_round_has_the_metrics_of_the_manifest(measured: RoundContext) -> None:
    records = measured.store.rounds
    for domain in DOMAINS:
        for name in MEASURED:
            assert all(f"{name}/{domain}" in record.metrics for record in records)
        for name in (*MEASURED, *COMPARED):
            assert f"{name}/{domain}" in records[1].metrics
            assert f"merge/{name}/{domain}" in records[1].metrics
        for name in COMPARED:
            assert f"{name}/{domain}" not in records[0].metrics, "the start is not its own rival"
    assert not any(name.startswith("merge/") for name in records[0].metrics)


def test_what_may_be_shipped_is_measured_sampled_and_greedy(measured: RoundContext) -> None:
    metrics = measured.store.record(2).metrics
    for name in ("last", "merge", "average"):
        for mode in ("sampled", "greedy"):
            assert f"ship/{name}/{mode}/gold/in_domain" in metrics
    # the last recipe of uniform is the average
    assert metrics["ship/merge/sampled/gold/in_domain"] == pytest.approx(
        metrics["ship/average/sampled/gold/in_domain"]
    )
    assert metrics["ship/last/sampled/gold/in_domain"] == metrics["gold/in_domain"]


def test_the_start_has_no_divergence_from_itself(measured: RoundContext) -> None:
    for domain in DOMAINS:
        assert abs(measured.store.record(0).metrics[f"kl/policy_sft/{domain}"]) < 1e-5
        assert measured.store.record(2).metrics[f"kl/policy_sft_k3/{domain}"] > 1e-3


def test_divergence_is_from_the_start(start: LettersPolicy, tmp_path: Path) -> None:
    context = snapshots(tmp_path, start, 1)
    finish_all(context, evaluation())
    # no merge: what is answered under the policy is scored under the start, not under itself
    assert context.store.record(1).metrics["kl/policy_sft_k3/in_domain"] > 1e-3


def test_the_same_policy_gets_the_same_answers_and_wins_half(
    start: LettersPolicy, tmp_path: Path
) -> None:
    context = snapshots(tmp_path, start, 0)
    context.store.add_snapshot(1, dict(context.store.source(0)))
    finish_all(context_of(tmp_path, start, 1, store=context.store), evaluation())
    scores = [
        json.loads((context.store.folder(index) / "scores.json").read_text()) for index in (0, 1)
    ]
    assert scores[0] == scores[1]
    assert len(set(scores[0]["in_domain"]["proxy"])) > 1
    metrics = context.store.record(1).metrics
    for name in ("win/sft", "win/sft_low", "win/sft_high", "win/previous"):
        assert metrics[f"{name}/in_domain"] == 0.5
    assert metrics["accuracy/in_domain"] == 0.0, "no pair has a margin"


def test_win_rates_are_those_of_the_written_scores(measured: RoundContext) -> None:
    scores = [
        json.loads((measured.store.folder(index) / "scores.json").read_text()) for index in range(3)
    ]
    for opponent, index in (("sft", 0), ("previous", 1)):
        ours, theirs = (scores[i]["in_domain"]["gold"] for i in (2, index))
        wins = [(a > b) + 0.5 * (a == b) for a, b in zip(ours, theirs, strict=True)]
        found = measured.store.record(2).metrics[f"win/{opponent}/in_domain"]
        assert found == pytest.approx(sum(wins) / len(wins))


@pytest.mark.parametrize("content", [None, "", "{}"])
def test_scores_that_cannot_be_read_cost_their_win_rates_only(
    content: str | None, start: LettersPolicy, tmp_path: Path
) -> None:
    context = snapshots(tmp_path, start, 1)
    finish_round([evaluation()], context_of(tmp_path, start, 0, store=context.store))
    file = context.store.folder(0) / "scores.json"
    file.unlink() if content is None else file.write_text(content)
    with pytest.warns(UserWarning, match=r"scores\.json cannot be read .* no win rates against"):
        finish_round([evaluation()], context_of(tmp_path, start, 1, store=context.store))
    metrics = context.store.record(1).metrics
    assert "gold/in_domain" in metrics
    assert not any(name.startswith("win/") for name in metrics)


@pytest.mark.parametrize("content", [None, "PAR1"])
def test_held_out_pairs_that_cannot_be_read_cost_their_domains_accuracy_only(
    content: str | None, start: LettersPolicy, tmp_path: Path
) -> None:
    context = snapshots(tmp_path, start, 1)
    finish_round([evaluation()], context_of(tmp_path, start, 0, store=context.store))
    file = context.store.folder(0) / "held_out_in_domain.parquet"
    file.unlink() if content is None else file.write_text(content)
    sentence = r"no held-out pairs .*held_out_in_domain\.parquet; accuracies of in_domain are left"
    with pytest.warns(UserWarning, match=sentence) as told:
        finish_round([evaluation()], context_of(tmp_path, start, 1, store=context.store))
    assert len(told) == 1
    metrics = context.store.record(1).metrics
    assert "accuracy/out_of_domain" in metrics
    assert "accuracy/in_domain" not in metrics


def test_held_out_pairs_are_labelled_by_gold_without_noise(measured: RoundContext) -> None:
    for domain in DOMAINS:
        pairs = read_pairs(measured.store.folder(0) / f"held_out_{domain}.parquet")
        assert pairs
        assert all(pair.score_chosen > pair.score_rejected for pair in pairs)
        assert all(pair.ref_chosen_logps < 0 for pair in pairs)


def test_the_annotators_noise_never_reaches_evaluation_pairs(
    start: LettersPolicy, tmp_path: Path
) -> None:
    found = []
    for name, noise in (("clean", LabelNoise()), ("noisy", LabelNoise(flip=1.0))):
        context = context_of(tmp_path / name, start)
        finish_round([TrajectorySnapshot(), letters_pairs(noise=noise), evaluation()], context)
        assert all(pair.flipped for pair in round_pairs(context.store, 0)) == (name == "noisy")
        folder = context.store.folder(0)
        found.append([read_pairs(folder / f"held_out_{domain}.parquet") for domain in DOMAINS])
    assert found[0] == found[1]
    for pairs in found[1]:
        assert pairs
        assert not any(pair.flipped for pair in pairs)
        assert all(pair.score_chosen > pair.score_rejected for pair in pairs)


def test_accuracy_is_against_the_start_where_the_loss_has_no_reference(
    start: LettersPolicy, tmp_path: Path
) -> None:
    context = snapshots(tmp_path, start, 1)
    context.data.evaluation_prompts = 60
    for index in (0, 1):
        free = SimpleNamespace(needs_reference=False)
        of_round = RoundContext(
            context.policy, context.store, index, data=context.data, receiver=free
        )
        finish_round([letters_pairs(), evaluation()], of_round)
    context.load(one_hot(1))
    for domain in DOMAINS:
        pairs = read_pairs(context.store.folder(0) / f"held_out_{domain}.parquet")
        policy, first = (
            score_pairs(model, pairs) for model in (context.policy, start.load_model())
        )
        margin = (policy.chosen - policy.rejected) - (first.chosen - first.rejected)
        expected = float((margin > 0).double().mean())
        assert 0 < expected < 1
        assert context.store.record(1).metrics[f"accuracy/{domain}"] == pytest.approx(expected)


def test_evaluation_leaves_the_policy_untouched(start: LettersPolicy, tmp_path: Path) -> None:
    context = snapshots(tmp_path, start, 1)
    finish_all(context, ReferenceMerge("last"), evaluation())
    before = {name: p.detach().clone() for name, p in context.policy.named_parameters()}
    state = torch.get_rng_state()
    again = RoundContext(context.policy, context.store, 1, data=letters_data())
    again.data.tokenizer = start.load_tokenizer()
    evaluation().evaluate(again)
    finish_round([], again)
    for name, parameter in context.policy.named_parameters():
        assert torch.equal(parameter, before[name]), name
        assert parameter.grad is None
    assert torch.equal(torch.get_rng_state(), state), "no global random state is used"


def test_a_row_a_round_is_printed_below_one_header(
    start: LettersPolicy, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    context = snapshots(tmp_path, start, 2)
    finish_all(context, ReferenceMerge("uniform"), evaluation())
    lines = capsys.readouterr().out.splitlines()
    table = [line.split() for line in lines[:4]]
    assert [words[0] for words in table] == ["round", "0", "1", "2"]
    assert "-0.00" not in lines[1]
    assert "of what may be shipped" in lines[5]


def test_without_judges_length_and_divergence_are_measured(
    start: LettersPolicy, tmp_path: Path
) -> None:
    context = snapshots(tmp_path, start, 1)
    finish_all(context, RoundEvaluation(max_new_tokens=6))
    for record in context.store.rounds:
        kinds = {name.split("/")[0] for name in record.metrics}
        assert kinds - {"ship"} == {"length", "kl"}


def test_at_another_temperature_no_divergence_is_claimed(
    start: LettersPolicy, tmp_path: Path
) -> None:
    context = snapshots(tmp_path, start, 1)
    finish_all(context, RoundEvaluation(max_new_tokens=6, temperature=0.7))
    names = list(context.store.record(1).metrics)
    assert names
    assert not [name for name in names if "kl/" in name]
