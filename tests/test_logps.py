from __future__ import annotations

from math import log

import pytest
import torch
from torch import Tensor, nn

from tpmm_pl.logps import (
    completion_logps,
    completion_tokens,
    sequence_logps,
    split_pairs,
    token_logps,
)
from tpmm_pl.types import IGNORE_INDEX

ROWS, LENGTH, WIDTH, VOCABULARY = 4, 9, 8, 32
FIRST_LABELLED = (3, 1, 5, 0)
"""Where each row's completion begins; position 0 is predicted by nothing."""


def labels() -> Tensor:
    tokens = torch.randint(VOCABULARY, (ROWS, LENGTH), generator=torch.Generator().manual_seed(1))
    for row, first in enumerate(FIRST_LABELLED):
        tokens[row, :first] = IGNORE_INDEX
    tokens[2, 7:] = IGNORE_INDEX
    return tokens


def hidden() -> Tensor:
    return torch.randn(ROWS, LENGTH, WIDTH, generator=torch.Generator().manual_seed(0))


def head() -> nn.Linear:
    torch.manual_seed(2)
    return nn.Linear(WIDTH, VOCABULARY)


def naive(logits: Tensor, labels: Tensor) -> Tensor:
    sums = []
    for row, targets in zip(logits.double(), labels, strict=True):
        total = torch.zeros((), dtype=torch.float64)
        for t in range(1, len(targets)):
            if targets[t] != IGNORE_INDEX:
                total = total + row[t - 1].log_softmax(-1)[targets[t]]
        sums.append(total)
    return torch.stack(sums)


def test_the_log_probabilities_by_hand() -> None:
    # p(1) is 1/4 of logits (log 3, 0); the last position predicts nothing
    logits = torch.tensor([[[log(3), 0.0], [0.0, 0.0], [9.0, 9.0]]])
    assert sequence_logps(logits, torch.tensor([[IGNORE_INDEX, 1, 0]])).item() == pytest.approx(
        log(1 / 4) + log(1 / 2)
    )
    assert token_logps(logits[0, :1], torch.tensor([0])).item() == pytest.approx(log(3 / 4))


def test_sequence_logps_equal_a_plain_loop() -> None:
    logits = head()(hidden())
    expected = naive(logits, labels()).float()
    torch.testing.assert_close(sequence_logps(logits, labels()), expected, atol=1e-5, rtol=1e-6)


@pytest.mark.parametrize("positions", [1, 2, 5, 1000])
def test_the_compact_head_equals_the_full_one_in_value_and_gradient(positions: int) -> None:
    results = []
    for compact in (True, False):
        states, layer = hidden().requires_grad_(), head()
        if compact:
            budget = 4 * VOCABULARY * positions
            values = completion_logps(states, labels(), layer, vocabulary=VOCABULARY, budget=budget)
        else:
            values = naive(layer(states), labels())
        weights = torch.arange(1.0, ROWS + 1)
        (values * weights).sum().backward()
        results.append((values.double(), states.grad, layer.weight.grad, layer.bias.grad))
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-6)


def test_the_head_never_sees_more_positions_than_the_budget_holds() -> None:
    seen: list[int] = []
    layer = head()

    def counting(states: Tensor) -> Tensor:
        seen.append(len(states))
        logits: Tensor = layer(states)
        return logits

    completion_logps(hidden(), labels(), counting, vocabulary=VOCABULARY, budget=4 * VOCABULARY * 7)
    predicted = int((labels()[:, 1:] != IGNORE_INDEX).sum())
    assert sum(seen) == predicted
    assert predicted < ROWS * (LENGTH - 1)
    assert max(seen) == 7


def test_a_budget_below_one_position_still_works() -> None:
    values = completion_logps(hidden(), labels(), head(), vocabulary=VOCABULARY, budget=1)
    torch.testing.assert_close(values, sequence_logps(head()(hidden()), labels()))


def test_chunks_are_the_same_without_gradient() -> None:
    with torch.no_grad():
        cut = completion_logps(hidden(), labels(), head(), vocabulary=VOCABULARY, budget=512)
        whole = completion_logps(hidden(), labels(), head())
    torch.testing.assert_close(cut, whole)


def test_a_row_without_labels_gives_0() -> None:
    blank = labels()
    blank[1] = IGNORE_INDEX
    assert completion_logps(hidden(), blank, head())[1].item() == 0
    blank[:] = IGNORE_INDEX
    assert completion_logps(hidden(), blank, head()).tolist() == [0.0] * ROWS


def test_a_label_at_the_first_position_is_not_predicted() -> None:
    moved = labels()
    moved[3, 0] = IGNORE_INDEX
    logits = head()(hidden())
    assert torch.equal(sequence_logps(logits, moved), sequence_logps(logits, labels()))
    assert completion_tokens(labels()).tolist() == [6.0, 8.0, 2.0, 8.0]


def test_long_completions_are_summed_in_float64() -> None:
    # one token of -1024 nats, then 4,096 of -2^-14: each is lost beside 1024 in float32
    count, small = 4096, 2.0**-14
    wrong = torch.tensor([0.0, 1024.0])
    right = torch.tensor([0.0, log(torch.expm1(torch.tensor(small, dtype=torch.float64)).item())])
    logits = torch.stack([wrong, *[right] * count, right])[None]
    values = sequence_logps(logits, torch.zeros(1, count + 2, dtype=torch.long))
    assert values.item() == pytest.approx(-1024 - count * small, abs=1e-3)
    assert values.dtype == torch.float32


def test_half_precision_logits_are_reduced_in_float32() -> None:
    logits = torch.zeros(1, 3, 32, dtype=torch.bfloat16)
    values = sequence_logps(logits, torch.zeros(1, 3, dtype=torch.long))
    assert values.dtype == torch.float32
    assert values.item() == pytest.approx(-2 * log(32), abs=1e-6)


def test_logits_and_labels_that_disagree_are_refused() -> None:
    with pytest.raises(ValueError, match=r"logits \(2, 3, 4\) but labels \(2, 4\)"):
        sequence_logps(torch.zeros(2, 3, 4), torch.zeros(2, 4, dtype=torch.long))


def test_the_first_half_of_the_rows_is_chosen() -> None:
    pairs = split_pairs(torch.arange(4.0))
    assert pairs.chosen.tolist() == [0.0, 1.0]
    assert pairs.rejected.tolist() == [2.0, 3.0]
