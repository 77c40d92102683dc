from __future__ import annotations

from math import exp, inf, nan
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tpmm_pl.noise import (
    LabelNoise,
    check_scores,
    draw_flips,
    flip_probabilities,
    noisy_flips,
)
from tpmm_pl.types import InputError

# scores of chosen and rejected, their lengths: one longer, one shorter, one of equal length
CHOSEN, REJECTED = torch.tensor([2.0, 1.0, 0.0]), torch.tensor([1.0, 1.0, 3.0])
LONG, SHORT = torch.tensor([9, 4, 6]), torch.tensor([4, 9, 6])
RATES = st.floats(0.0, 1.0)


def probabilities(**noise: float) -> list[float]:
    found = flip_probabilities(LabelNoise(**noise), CHOSEN, REJECTED, LONG, SHORT)
    assert found.dtype == torch.float64
    return found.tolist()


def drawn(rates: Tensor, seed: int = 0) -> Tensor:
    return draw_flips(rates, torch.Generator().manual_seed(seed))


def assert_frequency(flips: Tensor, rate: float) -> None:
    # four standard deviations of a binomial share
    bound = 4 * (rate * (1 - rate) / len(flips)) ** 0.5
    assert float(flips.double().mean()) == pytest.approx(rate, abs=bound)


def test_no_noise_is_the_identity() -> None:
    assert probabilities() == [0.0, 0.0, 0.0]
    assert not drawn(torch.zeros(1000)).any()
    assert (
        noisy_flips(LabelNoise(), [nan] * 5, [nan] * 5, [1] * 5, [2] * 5, "0/train") == [False] * 5
    )


def test_a_rate_of_1_swaps_every_label() -> None:
    assert probabilities(flip=1.0) == [1.0, 1.0, 1.0]
    assert drawn(torch.ones(1000)).all()


@given(RATES)
def test_a_flip_rate_is_the_probability_bit_for_bit(rate: float) -> None:
    assert probabilities(flip=rate) == [rate] * 3


def test_a_temperature_gives_bradley_terry_probabilities() -> None:
    # sigmoid of minus the difference over the temperature: differences 1, 0, -3
    expected = [1 / (1 + exp(1 / 0.5)), 0.5, 1 / (1 + exp(-3 / 0.5))]
    assert probabilities(temperature=0.5) == pytest.approx(expected, abs=1e-15)


def test_length_bias_gives_the_label_to_the_longer_completion() -> None:
    # chosen is longer, shorter, as long
    assert probabilities(length_bias=0.3) == [0.0, 0.3, 0.0]
    assert probabilities(length_bias=1.0) == [0.0, 1.0, 0.0]


def test_low_margins_are_swapped_more_often() -> None:
    # 0.4 exp(-|difference| / 2), differences 1, 0, -3
    expected = [0.4 * exp(-0.5), 0.4, 0.4 * exp(-1.5)]
    assert probabilities(low_margin=0.4, margin_scale=2.0) == pytest.approx(expected, abs=1e-15)


def test_kinds_of_noise_come_one_after_the_other() -> None:
    # differences of 0, chosen shorter: drawn 1/2, to the longer 1/2 + 1/4, swapped 3/4 * 1/2 +
    # 1/4 * 1/2 = 1/2, swapped again 1/2 * 9/10 + 1/2 * 1/10 = 1/2
    every = {"temperature": 1.0, "length_bias": 0.5, "low_margin": 0.5, "flip": 0.1}
    assert probabilities(**every)[1] == pytest.approx(0.5, abs=1e-15)
    # without a draw: to the longer 0.5, swapped 0.5 * 0.9 + 0.5 * 0.1
    assert probabilities(length_bias=0.5, flip=0.1)[1] == pytest.approx(0.5, abs=1e-15)
    # chosen longer, sigmoid(-1) drawn against it, of which 0.75 is left, then 0.2 swapped
    drawn_against = 0.75 / (1 + exp(1))
    expected = drawn_against * 0.8 + (1 - drawn_against) * 0.2
    found = probabilities(temperature=1.0, length_bias=0.25, flip=0.2)[0]
    assert found == pytest.approx(expected, abs=1e-15)


@settings(deadline=None, max_examples=50)
@given(
    st.builds(
        LabelNoise,
        temperature=st.sampled_from([0.0, 1e-3, 1.0, 1e6]),
        flip=RATES,
        length_bias=RATES,
        low_margin=RATES,
        margin_scale=st.sampled_from([1e-6, 1.0, 1e6]),
    )
)
def test_probabilities_stay_in_range_and_prefer_no_side(noise: LabelNoise) -> None:
    scores = CHOSEN * 1e3, REJECTED * 1e3
    found = flip_probabilities(noise, *scores, LONG, SHORT)
    assert ((found >= 0) & (found <= 1)).all()
    if noise.temperature:
        # a drawn label is the same whichever completion was called chosen
        other = flip_probabilities(noise, *scores[::-1], SHORT, LONG)
        assert torch.allclose(found + other, torch.ones(3, dtype=torch.float64), atol=1e-12)


@pytest.mark.parametrize("rate", [0.05, 0.3, 0.5])
def test_swaps_come_at_their_rate(rate: float) -> None:
    assert_frequency(drawn(torch.full((20000,), rate)), rate)


def test_each_group_of_a_data_set_is_swapped_at_its_own_rate() -> None:
    count, noise = 8000, LabelNoise(length_bias=0.4, flip=0.1)
    lengths = [3] * count + [7] * count
    flips = noisy_flips(noise, [nan] * 2 * count, [nan] * 2 * count, lengths, lengths[::-1], "k")
    assert_frequency(torch.tensor(flips[:count]), 0.4 * 0.9 + 0.6 * 0.1)
    assert_frequency(torch.tensor(flips[count:]), 0.1)


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 50))
def test_parts_draw_what_the_whole_draws(cut: int) -> None:
    rates = torch.linspace(0, 1, 50)
    generator = torch.Generator().manual_seed(5)
    parts = torch.cat([draw_flips(part, generator) for part in (rates[:cut], rates[cut:])])
    assert torch.equal(parts, drawn(rates, 5))


def test_a_draw_does_not_depend_on_what_the_other_pairs_are() -> None:
    rates = torch.full((500,), 0.5)
    others = torch.where(torch.arange(500) % 2 == 0, rates, 0.9)
    assert torch.equal(drawn(rates)[::2], drawn(others)[::2])


def test_a_higher_rate_only_adds_swaps() -> None:
    few, many = drawn(torch.full((500,), 0.2)), drawn(torch.full((500,), 0.4))
    assert few.any()
    assert (many | ~few).all()
    assert (many & ~few).any()


def test_a_data_set_is_swapped_as_its_key_says() -> None:
    def flips(key: str, count: int = 200) -> list[bool]:
        scores = [1.0] * count
        return noisy_flips(LabelNoise(flip=0.5), scores, scores, [1] * count, [1] * count, key)

    assert flips("0/train") == flips("0/train")
    assert flips("0/train") == flips("0/train", 300)[:200], "more rows leave the others as they are"
    assert flips("0/train") != flips("1/train")
    assert flips("0/train") != flips("0/fuse")
    # fixed for good: runs and caches rely on it
    assert [n for n, flip in enumerate(flips("0/train", 16)) if flip] == [2, 4, 6, 7, 9, 11, 13]
    assert all(isinstance(flip, bool) for flip in flips("0/train"))


def test_an_empty_data_set_has_no_swaps() -> None:
    assert noisy_flips(LabelNoise(temperature=1.0), [], [], [], [], "0/train") == []


@pytest.mark.parametrize("noise", [LabelNoise(temperature=1.0), LabelNoise(low_margin=0.1)])
def test_noise_by_scores_is_refused_where_pairs_have_none(noise: LabelNoise) -> None:
    scores = [1.0, nan, 1.0, 2.0, inf], [0.0, 0.0, nan, nan, 0.0]
    sentence = (
        r"needs the scores of both completions, and 4 of 5 pairs of here\.jsonl have none "
        r"\(pair 2, 3, 4, \.\.\.\); add score_chosen and score_rejected, or use flip or length_bias"
    )
    with pytest.raises(InputError, match=sentence):
        check_scores(noise, *scores, source="here.jsonl")
    with pytest.raises(InputError, match="4 of 5 pairs of the data have none"):
        noisy_flips(noise, *scores, [1] * 5, [1] * 5, "0/train")
    check_scores(noise, [1.0], [0.0])


@pytest.mark.parametrize("noise", [LabelNoise(), LabelNoise(flip=0.3, length_bias=0.2)])
def test_noise_without_scores_needs_none(noise: LabelNoise) -> None:
    check_scores(noise, [nan], [nan])
    found = flip_probabilities(noise, *torch.tensor([[nan], [nan], [2.0], [3.0]]))
    assert found.isfinite().all()


@pytest.mark.parametrize(
    ("setting", "sentence"),
    [
        ({"temperature": -1.0}, r"label noise: temperature is -1.0; it must be >= 0"),
        ({"temperature": inf}, r"label noise: temperature is inf"),
        ({"flip": -0.1}, r"label noise: flip is -0.1; it is a rate, in \[0, 1\]"),
        ({"flip": 1.1}, r"label noise: flip is 1.1"),
        ({"flip": nan}, r"label noise: flip is nan"),
        ({"length_bias": 2.0}, r"label noise: length_bias is 2.0"),
        ({"low_margin": -1.0}, r"label noise: low_margin is -1.0"),
        ({"margin_scale": 0.0}, r"label noise: margin_scale is 0.0; it must be > 0"),
    ],
)
def test_noise_out_of_range_is_refused(setting: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        LabelNoise(**setting)
