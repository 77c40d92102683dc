from __future__ import annotations

from collections.abc import Sequence
from math import exp, inf, nan

import pytest
import torch

from tpmm_pl.noise import LabelNoise
from tpmm_pl.pairing import METHODS, check_method, pair_completions
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
    min_margin: float = 0.0,
) -> list[Pair]:
    return pair_completions(
        samples,
        scores,
        method=method,
        noise=noise or LabelNoise(),
        generator=torch.Generator().manual_seed(seed),
        min_margin=min_margin,
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


def test_every_two_completions_are_paired() -> None:
    expected = ["ba", "ca", "da", "cb", "db", "cd"]
    made = words(pair(SAMPLES[:4], SCORES[:4], "all"))
    assert [chosen + rejected for _, chosen, rejected in made] == expected
    # two scores of 1, two of 0: ties among the six are dropped
    made = words(pair(SAMPLES[:4], [1.0, 0.0, 0.0, 1.0], "all"))
    assert [chosen + rejected for _, chosen, rejected in made] == ["ab", "ac", "db", "dc"]


def test_pairs_by_margin_are_all_pairs_with_the_difference_noted() -> None:
    noise = LabelNoise(flip=0.5)
    every = pair(SAMPLES, SCORES, "all", noise)
    made = pair(SAMPLES, SCORES, "margin", noise)
    assert words(made) == words(every)
    assert [one.margin for one in made] == [1, 3, 2, 2, 1, 1, 1, 5, 7, 6, 8, 2]
    assert {one.margin for one in every} == {0.0}
    assert 0 < sum(one.flipped for one in made) < len(made), "swapped ones have one too"


@pytest.mark.parametrize("method", ["adjacent", "best_worst", "all", "random", "best_random"])
def test_a_margin_holds_for_every_method(method: str) -> None:
    every = pair(SAMPLES, SCORES, method)
    wide = [made for made in every if made.score_chosen - made.score_rejected >= 4]
    assert words(pair(SAMPLES, SCORES, method, min_margin=4.0)) == words(wide) != words(every)


def test_two_random_completions_are_paired() -> None:
    samples = [c for index in range(3000) for c in completions(str(index), "abc")]
    made = words(pair(samples, [1.0, 2.0, 3.0] * 3000, "random"))
    assert [prompt for prompt, *_ in made] == [str(index) for index in range(3000)]
    for expected in ("ba", "ca", "cb"):
        share = sum(chosen + rejected == expected for _, chosen, rejected in made) / 3000
        assert share == pytest.approx(1 / 3, abs=4 * (2 / 9 / 3000) ** 0.5)


def test_the_best_is_paired_with_a_random_other() -> None:
    samples = [c for index in range(3000) for c in completions(str(index), "abcd")]
    made = words(pair(samples, [1.0, 9.0, 3.0, 2.0] * 3000, "best_random"))
    assert {chosen for _, chosen, _ in made} == {"b"}
    for expected in "acd":
        share = sum(rejected == expected for *_, rejected in made) / 3000
        assert share == pytest.approx(1 / 3, abs=4 * (2 / 9 / 3000) ** 0.5)


@pytest.mark.parametrize(
    ("alias", "name"), [("max_min", "best_worst"), ("max_random", "best_random")]
)
def test_names_of_online_rlhf_are_understood(alias: str, name: str) -> None:
    assert words(pair(SAMPLES, SCORES, alias)) == words(pair(SAMPLES, SCORES, name))


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


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_identical_completions_are_never_paired(method: str, temperature: float) -> None:
    noise = LabelNoise(temperature=temperature)
    assert pair(completions("p", "aa"), [1.0, 2.0], method, noise) == []


@pytest.mark.parametrize("method", METHODS)
def test_ties_are_dropped_unless_the_label_is_drawn(method: str) -> None:
    samples = completions("p", "ab")
    assert pair(samples, [1.0, 1.0], method) == []
    assert len(pair(samples, [1.0, 1.0], method, LabelNoise(temperature=1.0))) == 1


@pytest.mark.parametrize("method", METHODS)
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


def test_length_bias_swaps_pairs_whose_chosen_completion_is_shorter() -> None:
    samples = completions("p", ["a", "bb"]) + completions("q", ["cc", "d"])
    samples += completions("r", "ef")
    made = pair(samples, [1.0, 0.0] * 3, noise=LabelNoise(length_bias=1.0))
    assert words(made) == [("p", "bb", "a"), ("q", "cc", "d"), ("r", "e", "f")]
    assert [one.flipped for one in made] == [True, False, False]
    assert (made[0].score_chosen, made[0].score_rejected) == (0.0, 1.0)


def test_length_bias_overrules_the_label_that_was_drawn() -> None:
    samples = [c for index in range(500) for c in completions(str(index), ["a", "bb"])]
    noise = LabelNoise(temperature=1.0, length_bias=1.0)
    made = pair(samples, [1.0, 0.0] * 500, noise=noise)
    assert {one.chosen for one in made} == {"bb"}
    # recorded as flipped only where the draw had said otherwise
    assert 0 < sum(one.flipped for one in made) < 500


def test_pairs_of_a_low_margin_are_swapped_more_often() -> None:
    samples = [c for index in range(4000) for c in completions(str(index), "ab")]
    noise = LabelNoise(low_margin=0.5, margin_scale=0.2)
    made = pair(samples, [0.1, 0.0] * 2000 + [0.4, 0.0] * 2000, noise=noise)
    for part, difference in ((made[:2000], 0.1), (made[2000:], 0.4)):
        rate = 0.5 * exp(-difference / 0.2)
        share = sum(one.flipped for one in part) / 2000
        assert share == pytest.approx(rate, abs=4 * (rate * (1 - rate) / 2000) ** 0.5)


def test_labels_are_the_ones_that_recorded_runs_have() -> None:
    """Draws of temperature and flip must stay: results of earlier runs rest on them."""
    samples = [c for index in range(12) for c in completions(str(index), "abcd")]
    noise = LabelNoise(temperature=1.0, flip=0.3)
    made = pair(samples, [0.0, 1.0, 3.0, 2.0] * 12, noise=noise)
    found = "".join(one.chosen.upper() if one.flipped else one.chosen for one in made)
    assert found == "bDbcbcBcbDbcbCacBDacADBd"


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


def test_an_unknown_method_names_the_nearest() -> None:
    with pytest.raises(InputError, match=r"unknown pairing method 'best'; .*best_worst"):
        pair(SAMPLES, SCORES, "best")


@pytest.mark.parametrize("score", [nan, inf])
def test_a_score_that_is_no_number_is_refused(score: float) -> None:
    sentence = "score of completion 3 of prompt q is (nan|inf); a label needs a finite number"
    with pytest.raises(InputError, match=sentence):
        pair(SAMPLES, [*SCORES[:-1], score])


def test_a_negative_margin_is_refused() -> None:
    with pytest.raises(InputError, match=r"min_margin is -1\.0; it is a difference of scores"):
        check_method("all", -1.0)


def test_a_score_too_few_is_refused() -> None:
    with pytest.raises(ValueError, match="shorter"):
        pair(SAMPLES, SCORES[:-1])
