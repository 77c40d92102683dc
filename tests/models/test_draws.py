from __future__ import annotations

from math import inf, log, log1p

import pytest
import torch
from scipy.stats import chi2, kstest
from torch import Tensor

from tpmm_pl.models.draws import draw_tokens, exponential_noise, row_keys

CPU = torch.device("cpu")


def random_keys(count: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(-(2**62), 2**62, (count,), generator=generator)


def statistic(tokens: Tensor, probabilities: Tensor) -> float:
    """Pearson's, chi-squared with one degree of freedom less than tokens."""
    expected = len(tokens) * probabilities.double()
    counts = tokens.bincount(minlength=len(probabilities)).double()
    return float(((counts - expected).square() / expected).sum())


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_follow_the_softmax(temperature: float) -> None:
    probabilities = torch.tensor([0.4, 0.25, 0.15, 0.1, 0.06, 0.04])
    keys = row_keys([f"0/{index}" for index in range(20_000)], CPU)
    # logits are known up to a constant
    scores = 3 + probabilities.log().expand(len(keys), -1)
    drawn = draw_tokens(scores, keys, 0, temperature)
    tempered = (probabilities.log() / temperature).softmax(0)
    assert statistic(drawn.tokens, tempered) < chi2.isf(1e-3, df=5)
    torch.testing.assert_close(drawn.logps, probabilities.log()[drawn.tokens])


def test_draws_follow_the_softmax_over_positions_of_one_row() -> None:
    probabilities = torch.tensor([0.5, 0.3, 0.2])
    key, scores = torch.tensor([123456789]), probabilities.log()[None]
    drawn = [draw_tokens(scores, key, position, 1.0).tokens for position in range(4_000)]
    assert statistic(torch.cat(drawn), probabilities) < chi2.isf(1e-3, df=2)


def test_draws_follow_a_flat_softmax_over_a_large_vocabulary() -> None:
    keys = random_keys(2_000)
    tokens = draw_tokens(torch.zeros(len(keys), 4_096), keys, 5, 1.0).tokens
    # 64 tokens a bin
    assert statistic(tokens // 64, torch.full((64,), 1 / 64)) < chi2.isf(1e-3, df=63)


def test_temperature_zero_takes_the_most_likely_token() -> None:
    scores = torch.randn(50, 9, generator=torch.Generator().manual_seed(0))
    drawn = draw_tokens(scores, random_keys(50), 3, 0.0)
    assert torch.equal(drawn.tokens, scores.argmax(-1))
    torch.testing.assert_close(drawn.logps, scores.log_softmax(-1).amax(-1))


def test_a_low_temperature_comes_to_the_most_likely_token() -> None:
    # divided by the temperature, the log-probabilities of so flat a softmax underflow
    scores = torch.zeros(100, 4_096)
    scores[:, 7] = 1.0
    drawn = draw_tokens(scores, random_keys(100), 0, 0.01)
    assert set(drawn.tokens.tolist()) == {7}


def test_a_token_without_probability_is_never_drawn() -> None:
    scores = torch.tensor([-inf, 0.0, -200.0, -inf]).expand(1_000, -1)
    drawn = draw_tokens(scores, random_keys(1_000), 0, 1.0)
    assert set(drawn.tokens.tolist()) == {1}
    assert torch.equal(drawn.logps, torch.zeros(1_000))


def test_a_draw_depends_on_its_row_alone() -> None:
    scores = torch.randn(40, 33, generator=torch.Generator().manual_seed(0))
    keys = random_keys(40)
    whole = draw_tokens(scores, keys, 2, 1.0)
    order = torch.arange(39, -1, -3)
    part = draw_tokens(scores[order], keys[order], 2, 1.0)
    assert torch.equal(part.tokens, whole.tokens[order])
    assert torch.equal(part.logps, whole.logps[order])


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    scores = torch.randn(40, 33, generator=torch.Generator().manual_seed(0))
    whole = draw_tokens(scores, random_keys(40), 2, 1.0)
    for chunk in (1, 100):
        monkeypatch.setattr("tpmm_pl.models.draws._CHUNK", chunk)
        cut = draw_tokens(scores, random_keys(40), 2, 1.0)
        assert torch.equal(cut.tokens, whole.tokens)
        assert torch.equal(cut.logps, whole.logps)


def test_low_precision_scores_are_reduced_in_float32() -> None:
    scores = torch.randn(8, 1_000, generator=torch.Generator().manual_seed(0)).bfloat16()
    drawn = draw_tokens(scores, random_keys(8), 0, 1.0)
    exact = scores.double().log_softmax(-1).gather(1, drawn.tokens[:, None]).squeeze(1)
    torch.testing.assert_close(drawn.logps.double(), exact, atol=1e-5, rtol=0)


def test_the_noise_is_exponential() -> None:
    keys = random_keys(200)
    noise = exponential_noise(keys, 0, 1_000)
    assert noise.dtype == torch.float32
    assert noise.isfinite().all()
    assert (noise > 0).all()
    assert kstest(noise.flatten().numpy(), "expon").pvalue > 1e-3
    # what wins a race is small
    small = noise[noise < 1e-3]
    assert kstest(small.numpy() / 1e-3, "uniform").pvalue > 1e-3


def test_the_longest_time_is_finite() -> None:
    # the first token of these keys whose uniform number rounds to 1 in float32
    noise = exponential_noise(torch.tensor([84]), 0, 17_539)
    assert float(noise[0, -1]) == pytest.approx(24 * log(2))


@pytest.mark.parametrize(
    ("keys", "position", "shift"),
    [(0, 0, 1), (0, 1, 0), (1, 0, 0), (1 << 32, 0, 0), (0, 1, 1)],
    ids=["token", "position", "key", "high half of the key", "position and token"],
)
def test_neighbours_are_unrelated(keys: int, position: int, shift: int) -> None:
    # logarithms: a correlation among the small values would count
    noise = exponential_noise(random_keys(200), 0, 1_001).log()
    other = exponential_noise(random_keys(200) + keys, position, 1_001).log()
    pair = torch.stack([noise[:, : 1_001 - shift].flatten(), other[:, shift:].flatten()])
    assert abs(float(pair.corrcoef()[0, 1])) < 4 / pair.shape[1] ** 0.5


def test_no_two_rows_share_their_noise() -> None:
    keys = torch.cat([random_keys(300), torch.arange(300)])
    noise = torch.cat([exponential_noise(keys, position, 8) for position in range(3)])
    assert len(noise.unique(dim=0)) == 3 * len(keys)
    # nor is one row's the other's, moved by some tokens
    first = exponential_noise(keys, 0, 64)
    assert len(first.unique()) > 0.999 * first.numel()


def test_the_noise_is_the_same_on_every_machine() -> None:
    # a golden value: a changed hash would silently change every finished run's resumed samples
    noise = exponential_noise(torch.tensor([1, -1]), 2, 3)
    expected = reference_noise(1, 2, 3) + reference_noise(-1, 2, 3)
    torch.testing.assert_close(noise.flatten(), torch.tensor(expected), atol=0, rtol=1e-6)
    assert row_keys(["0/1/train/p0/0"], CPU).tolist() == [6095846282074164062]


def reference_noise(key: int, position: int, vocabulary: int) -> list[float]:
    """The same in Python's integers."""
    wide, narrow = (1 << 64) - 1, (1 << 32) - 1
    x = (key + (position + 1) * 0x9E3779B97F4A7C15) & wide
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & wide
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & wide
    x ^= x >> 31
    high, low = x >> 32, x & narrow

    def noise(token: int) -> float:
        y = (token + high) & narrow
        y = ((y ^ (y >> 16)) * 0x21F0AAAD) & narrow
        y ^= low
        y = ((y ^ (y >> 15)) * 0xD35A2D97) & narrow
        y ^= y >> 15
        return -log1p(-((y & 0x7FFFFFFF) + 0.5) * 2.0**-31)

    return [noise(token) for token in range(vocabulary)]
