from __future__ import annotations

from math import log

import pytest
import torch
from torch import Tensor

from tests.test_head_logps import STATE_OF, TARGETS, assert_near, inputs
from tpmm_pl.logps import head_logps, sequence_logps, split_pairs, token_logps
from tpmm_pl.types import IGNORE_INDEX

ROWS, LENGTH, VOCABULARY = 4, 9, 32
FIRST_LABELLED = (3, 1, 5, 0)
"""Where each row's completion begins; position 0 is predicted by nothing."""


def labels() -> Tensor:
    tokens = torch.randint(VOCABULARY, (ROWS, LENGTH), generator=torch.Generator().manual_seed(1))
    for row, first in enumerate(FIRST_LABELLED):
        tokens[row, :first] = IGNORE_INDEX
    tokens[2, 7:] = IGNORE_INDEX
    return tokens


def logits() -> Tensor:
    return torch.randn(ROWS, LENGTH, VOCABULARY, generator=torch.Generator().manual_seed(0))


def loop(logits: Tensor, labels: Tensor) -> Tensor:
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
    state, targets = torch.tensor([0, 1, 0]), torch.tensor([0, 1, 1])
    expected = [log(3 / 4), log(1 / 2), log(1 / 4)]
    assert token_logps(logits[0], state, targets).tolist() == pytest.approx(expected)
    values = head_logps(logits[0], torch.eye(2), None, state, targets)
    assert values.tolist() == pytest.approx(expected)


def test_token_logps_are_those_of_the_head() -> None:
    hidden, weight, bias = inputs()
    scores = torch.nn.functional.linear(hidden, weight, bias)
    values = token_logps(scores, STATE_OF, TARGETS)
    expected = head_logps(hidden, weight, bias, STATE_OF, TARGETS)
    torch.testing.assert_close(values, expected, atol=1e-6, rtol=0)


def test_sequence_logps_equal_a_plain_loop() -> None:
    given = logits().requires_grad_()
    values, expected = sequence_logps(given, labels()), loop(given, labels())
    torch.testing.assert_close(values, expected.float(), atol=1e-5, rtol=1e-6)
    weights = torch.arange(1.0, ROWS + 1)
    ours, theirs = (
        torch.autograd.grad((one * weights).sum(), given)[0] for one in (values, expected)
    )
    assert_near(ours, theirs, 1e-6)


def test_a_row_without_labels_gives_0() -> None:
    blank = labels()
    blank[1] = IGNORE_INDEX
    assert sequence_logps(logits(), blank)[1].item() == 0
    blank[:] = IGNORE_INDEX
    assert sequence_logps(logits(), blank).tolist() == [0.0] * ROWS


def test_a_label_at_the_first_position_is_not_predicted() -> None:
    moved = labels()
    assert moved[3, 0] != IGNORE_INDEX
    moved[3, 0] = IGNORE_INDEX
    assert torch.equal(sequence_logps(logits(), moved), sequence_logps(logits(), labels()))


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
    state, targets = torch.zeros(2, dtype=torch.long), torch.zeros(2, dtype=torch.long)
    weight = torch.zeros(32, 4, dtype=torch.bfloat16)
    values = head_logps(torch.ones(1, 4, dtype=torch.bfloat16), weight, None, state, targets)
    assert values.dtype == torch.float32
    assert values.tolist() == pytest.approx([-log(32)] * 2, abs=1e-6)


def test_logits_and_labels_that_disagree_are_refused() -> None:
    with pytest.raises(ValueError, match=r"logits \(2, 3, 4\) but labels \(2, 4\)"):
        sequence_logps(torch.zeros(2, 3, 4), torch.zeros(2, 4, dtype=torch.long))


def test_the_first_half_of_the_rows_is_chosen() -> None:
    pairs = split_pairs(torch.arange(4.0))
    assert pairs.chosen.tolist() == [0.0, 1.0]
    assert pairs.rejected.tolist() == [2.0, 3.0]
