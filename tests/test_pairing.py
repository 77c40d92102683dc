from __future__ import annotations

from collections.abc import Sequence
from math import exp

import pytest
import torch

from tpmm_pl.pairing import LabelNoise, pair_completions
from tpmm_pl.types import Completion, InputError, Pair, Prompt


def completions(prompt_id: str, texts: Sequence[str]) -> list[Completion]:
    prompt = Prompt(prompt_id, f"<{prompt_id}>", (1, 2))
    return [
        Completion(prompt, index, tuple(map(ord, text)), text, True, -1.0)
        for index, text in enumerate(texts)
    ]


def pair(
    samples: Sequence[Completion],
    scores: Sequence[float],
    method: str = "adjacent",
    noise: LabelNoise | None = None,
    seed: int = 0,
) -> list[Pair]:
    generator = torch.Generator().manual_seed(seed)
    return pair_completions(
        samples, scores, method=method, noise=noise or LabelNoise(), generator=generator
    )


def words(pairs: Sequence[Pair]) -> list[tuple[str, str, str]]:
    return [(pair.prompt_id, pair.chosen, pair.rejected) for pair in pairs]


SAMPLES = completions("p", "abcd") + completions("q", "efgh")
SCORES = [1.0, 2.0, 4.0, 3.0, 0.0, -1.0, 5.0, 7.0]


def test_adjacent_samples_are_paired() -> None:
    expected = [("p", "b", "a"), ("p", "c", "d"), ("q", "e", "f"), ("q", "h", "g")]
    assert words(pair(SAMPLES, SCORES)) == expected


def test_the_best_is_paired_with_the_worst() -> None:
    assert words(pair(SAMPLES, SCORES, "best_worst")) == [("p", "c", "a"), ("q", "h", "f")]


def test_a_pair_holds_what_it_was_made_of() -> None:
    (made,) = pair(completions("p", "ab"), [1.0, 2.0])
    assert made == Pair(
        prompt_id="p",
        prompt="<p>",
        chosen="b",
        rejected="a",
        prompt_ids=(1, 2),
        chosen_ids=(98,),
        rejected_ids=(97,),
        score_chosen=2.0,
        score_rejected=1.0,
        ref_chosen_logps=made.ref_chosen_logps,
        ref_rejected_logps=made.ref_rejected_logps,
    )
    assert (made.flipped, made.weight) == (False, 1.0)
    assert made.ref_chosen_logps != made.ref_chosen_logps  # NaN: not scored yet


@pytest.mark.parametrize("method", ["adjacent", "best_worst"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_identical_completions_are_never_paired(method: str, temperature: float) -> None:
    noise = LabelNoise(temperature=temperature)
    assert pair(completions("p", "aa"), [1.0, 2.0], method, noise) == []


@pytest.mark.parametrize("method", ["adjacent", "best_worst"])
def test_ties_are_dropped_unless_the_label_is_drawn(method: str) -> None:
    samples = completions("p", "ab")
    assert pair(samples, [1.0, 1.0], method) == []
    assert len(pair(samples, [1.0, 1.0], method, LabelNoise(temperature=1.0))) == 1


@pytest.mark.parametrize("method", ["adjacent", "best_worst"])
def test_a_single_sample_makes_no_pair(method: str) -> None:
    assert pair(completions("p", "a"), [1.0], method) == []
    assert pair([], [], method) == []


def test_the_odd_sample_is_left_over() -> None:
    assert words(pair(completions("p", "abc"), [1.0, 2.0, 3.0])) == [("p", "b", "a")]


def test_flips_come_at_their_rate_and_are_recorded() -> None:
    samples = [c for index in range(4000) for c in completions(str(index), "ab")]
    pairs = pair(samples, [1.0, 2.0] * 4000, noise=LabelNoise(flip=0.2))
    flipped = [pair for pair in pairs if pair.flipped]
    # four standard deviations of a binomial share
    assert len(flipped) / 4000 == pytest.approx(0.2, abs=4 * (0.2 * 0.8 / 4000) ** 0.5)
    for made in pairs:
        winner, loser = ("a", "b") if made.flipped else ("b", "a")
        assert (made.chosen, made.rejected) == (winner, loser)
        assert (made.score_chosen < made.score_rejected) == made.flipped


def test_a_flip_at_rate_1_swaps_every_label() -> None:
    pairs = pair(SAMPLES, SCORES, noise=LabelNoise(flip=1.0))
    swapped = [(prompt, rejected, chosen) for prompt, chosen, rejected in words(pairs)]
    assert swapped == words(pair(SAMPLES, SCORES))
    assert all(made.flipped for made in pairs)


@pytest.mark.parametrize(("difference", "temperature"), [(1.0, 1.0), (-2.0, 1.0), (3.0, 2.0)])
def test_drawn_labels_follow_bradley_terry(difference: float, temperature: float) -> None:
    samples = [c for index in range(4000) for c in completions(str(index), "ab")]
    noise = LabelNoise(temperature=temperature)
    pairs = pair(samples, [difference, 0.0] * 4000, noise=noise)
    rate = 1 / (1 + exp(-difference / temperature))
    first = sum(made.chosen == "a" for made in pairs) / 4000
    assert first == pytest.approx(rate, abs=4 * (rate * (1 - rate) / 4000) ** 0.5)
    assert not any(made.flipped for made in pairs)


def test_a_flip_does_not_depend_on_the_label_that_was_drawn() -> None:
    samples = [c for index in range(4000) for c in completions(str(index), "ab")]
    noise = LabelNoise(temperature=1.0, flip=0.3)
    pairs = pair(samples, [1.0, 0.0] * 4000, noise=noise)
    for word in "ab":
        drawn = [made.flipped for made in pairs if (made.chosen == word) != made.flipped]
        share = sum(drawn) / len(drawn)
        assert share == pytest.approx(0.3, abs=4 * (0.3 * 0.7 / len(drawn)) ** 0.5)


def test_extreme_differences_do_not_overflow() -> None:
    noise = LabelNoise(temperature=1e-3)
    assert words(pair(SAMPLES[:2], [0.0, 1e6], noise=noise)) == [("p", "b", "a")]


def test_labels_are_those_of_the_generator() -> None:
    noise = LabelNoise(temperature=3.0, flip=0.3)
    samples = [c for index in range(50) for c in completions(str(index), "ab")]
    scores = [1.0, 2.0] * 50
    made = [words(pair(samples, scores, noise=noise, seed=seed)) for seed in (0, 0, 1)]
    assert made[0] == made[1] != made[2]


def test_a_dropped_candidate_does_not_change_the_labels_of_others() -> None:
    noise = LabelNoise(temperature=3.0, flip=0.3)
    samples = [c for index in range(50) for c in completions(str(index), "ab")]
    scores = [1.0, 2.0] * 50
    same = [*completions("0", "aa"), *samples[2:]]
    assert words(pair(same, scores, noise=noise)) == words(pair(samples, scores, noise=noise))[1:]


@pytest.mark.parametrize("values", [(-1.0, 0.0), (0.0, -0.1), (0.0, 1.1)])
def test_noise_out_of_range_is_refused(values: tuple[float, float]) -> None:
    with pytest.raises(InputError, match="label noise needs temperature >= 0 and flip in"):
        LabelNoise(*values)


def test_an_unknown_method_names_the_nearest() -> None:
    with pytest.raises(InputError, match=r"unknown pairing method 'best'; .*best_worst"):
        pair(SAMPLES, SCORES, "best")


def test_a_score_too_few_is_refused() -> None:
    with pytest.raises(ValueError, match="shorter"):
        pair(SAMPLES, SCORES[:-1])
