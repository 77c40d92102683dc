from __future__ import annotations

from math import exp, log

import pytest
import torch

from tpmm_pl.evaluation import Answers, accuracy_metrics, table_header, table_row, win_metrics
from tpmm_pl.trajectory import Record
from tpmm_pl.types import Completion, Pair, PairLogps, Prompt, Recipe

PROMPT = Prompt("p", "w0", (6,))
ROW = {
    "gold/in_domain": 0.75,
    "proxy/in_domain": 1.25,
    "win/sft/in_domain": 0.625,
    "kl/policy_sft/in_domain": 2.5,
    "length/in_domain": 4.0,
}


def answer(length: int, logps: float) -> Completion:
    return Completion(PROMPT, 0, tuple(range(length)), "", True, logps)


def pair(chosen: float, rejected: float) -> Pair:
    return Pair("p", "", "", "", (6,), (7,), (8,), 1.0, 0.0, False, 1.0, chosen, rejected)


def test_answers_are_measured_as_by_hand() -> None:
    answers = Answers([answer(2, -1.0), answer(4, -2.0)], {"gold": [0.5, 1.0]}, [-1.5, -3.5])
    # log-ratios 0.5 and 1.5, standard deviation sqrt(1/2)
    k3 = (exp(-0.5) - 1 + 0.5 + exp(-1.5) - 1 + 1.5) / 2
    assert answers.metrics("in_domain") == pytest.approx(
        {
            "gold/in_domain": 0.75,
            "length/in_domain": 3.0,
            "kl/policy_sft/in_domain": 1.0,
            "kl/policy_sft_k3/in_domain": k3,
            "kl/policy_sft_se/in_domain": 0.5,
        }
    )


def test_without_the_starts_log_probabilities_there_is_no_divergence() -> None:
    found = Answers([answer(2, -1.0)], {}).metrics("x")
    assert found == {"length/x": 2.0}


def test_one_answer_has_no_standard_error() -> None:
    found = Answers([answer(2, -1.0)], {}, [-2.0]).metrics("x")
    assert found["kl/policy_sft/x"] == 1.0
    assert "kl/policy_sft_se/x" not in found


def test_a_tie_is_half_a_win() -> None:
    found = win_metrics([1.0, 2.0, 3.0, 4.0], [1.0, 1.0, 4.0, 4.0], "sft", "in_domain")
    assert found["win/sft/in_domain"] == 0.5
    assert 0 <= found["win/sft_low/in_domain"] < 0.5 < found["win/sft_high/in_domain"] <= 1


def test_the_interval_of_a_win_rate_is_the_same_every_time() -> None:
    scores = torch.rand(20, generator=torch.Generator().manual_seed(0)).tolist()
    other = scores[::-1]
    assert win_metrics(scores, other, "sft", "x") == win_metrics(scores, other, "sft", "x")


def test_accuracy_counts_margins_over_the_reference() -> None:
    # margins over the reference: 1 - 0, 1 - 2, 0 - 0 (no preference), 3 - 1
    logps = PairLogps(torch.tensor([-1.0, -1.0, -2.0, -1.0]), torch.tensor([-2.0, -2.0, -2.0, -4]))
    pairs = [pair(-1.0, -1.0), pair(-1.0, -3.0), pair(-5.0, -5.0), pair(-1.0, -2.0)]
    found = accuracy_metrics(pairs, logps, "in_domain")
    assert found["accuracy/in_domain"] == 0.5
    # Wilson's interval of 2 in 4
    assert found["accuracy_low/in_domain"] == pytest.approx(0.15004, abs=1e-4)
    assert found["accuracy_high/in_domain"] == pytest.approx(0.84996, abs=1e-4)


def test_a_row_stands_below_its_headings() -> None:
    recipe = Recipe("learned", (0, 1), ((0.25, 0.75),))
    record = Record(3, recipe=recipe, metrics=ROW, notes={"guard": "guard: high"})
    header, row = table_header(ROW), table_row(record, ROW)
    assert header == (
        "round   gold  proxy win sft KL nats tokens  reference (coefficients by round)"
    )
    assert row == (
        "    3  0.750  1.250    0.62    2.50    4.0"
        "  learned [0:0.25 1:0.75] entropy 0.56 (guard: high)"
    )
    assert -(0.25 * log(0.25) + 0.75 * log(0.75)) == pytest.approx(0.56, abs=0.005)


def test_what_a_round_has_not_measured_is_a_dash() -> None:
    row = table_row(Record(0, metrics={"gold/in_domain": 0.5}), ROW)
    assert row.split() == ["0", "0.500", "-", "-", "-", "-", "-"]


def test_one_snapshot_has_no_entropy_and_groups_are_averaged() -> None:
    alone = table_row(Record(0, recipe=Recipe("last", (0,))), {})
    assert alone.split("  ")[-1] == "last [0:1.00]"
    rows = ((0.0, 1.0), (1.0, 0.0))
    grouped = Recipe("learned", (0, 1), rows, "layer", ("embeddings", "head"))
    assert "[0:0.50 1:0.50] entropy 0.00" in table_row(Record(1, recipe=grouped), {})


@pytest.mark.parametrize(("kl", "shown"), [(-1e-7, "0.00"), (-0.004, "0.00"), (-0.01, "-0.01")])
def test_a_divergence_that_rounds_to_zero_has_no_sign(kl: float, shown: str) -> None:
    metrics = {"kl/policy_sft/in_domain": kl}
    assert table_row(Record(0, metrics=metrics), metrics).split() == ["0", shown, "-"]
