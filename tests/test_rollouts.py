from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from scipy.stats import chi2, kstest
from torch import Tensor, nn
from transformers import PreTrainedModel

from tests.models.tiny import EOS, PAD, tiny_gpt2, tiny_llama, tiny_tokenizer
from tpmm_pl.models.scoring import score_completions
from tpmm_pl.rollouts import KeyedSampling, gumbel_noise, sample_completions
from tpmm_pl.types import Completion, Prompt

TOKENIZER = tiny_tokenizer()


def prompts(count: int = 5) -> list[Prompt]:
    generator = torch.Generator().manual_seed(0)
    made = []
    for index in range(count):
        # lengths 1 to 5: batches are padded
        ids = torch.randint(6, 32, (1 + index % 5,), generator=generator).tolist()
        made.append(Prompt(f"p{index}", "", tuple(ids)))
    return made


def model(factory: Any = tiny_llama, scale: float = 4.0) -> PreTrainedModel:
    made: PreTrainedModel = factory(seed=0)
    for parameter in made.parameters():
        parameter.data *= scale
    return made


def sample(policy: nn.Module, asked: list[Prompt], **changes: Any) -> list[Completion]:
    settings: dict[str, Any] = {"samples": 3, "max_new_tokens": 12, "key": "0/1/train", **changes}
    return sample_completions(policy, TOKENIZER, asked, **settings)


def ids(completions: list[Completion]) -> dict[tuple[str, int], tuple[int, ...]]:
    return {(c.prompt.prompt_id, c.index): c.ids for c in completions}


@pytest.mark.parametrize("factory", [tiny_llama, tiny_gpt2])
@pytest.mark.parametrize("batch_size", [1, 2, 7])
def test_the_same_key_gives_the_same_completions_whatever_the_batch(
    factory: Any, batch_size: int
) -> None:
    whole = sample(model(factory), prompts())
    cut = sample(model(factory), prompts(), batch_size=batch_size)
    assert ids(cut) == ids(whole)
    assert [c.logps for c in cut] == pytest.approx([c.logps for c in whole], abs=1e-4)


def test_the_order_and_number_of_prompts_change_nothing() -> None:
    whole = ids(sample(model(), prompts()))
    backwards = ids(sample(model(), prompts()[::-1]))
    assert backwards == whole
    few = ids(sample(model(), prompts()[1:3], samples=2))
    assert few == {key: whole[key] for key in few}


def test_the_global_generator_neither_matters_nor_moves() -> None:
    torch.manual_seed(0)
    first = sample(model(), prompts())
    policy = model()
    torch.manual_seed(1)
    state = torch.get_rng_state()
    assert sample(policy, prompts()) == first
    assert torch.equal(torch.get_rng_state(), state)


def test_another_key_another_prompt_and_another_sample_draw_anew() -> None:
    first = ids(sample(model(), prompts()))
    assert ids(sample(model(), prompts(), key="0/2/train")) != first
    renamed = [replace(prompt, prompt_id=f"q{prompt.prompt_id}") for prompt in prompts()]
    assert list(ids(sample(model(), renamed)).values()) != list(first.values())
    assert len({tokens for (prompt, _), tokens in first.items() if prompt == "p0"}) > 1


def test_completions_come_prompt_by_prompt_and_sample_by_sample() -> None:
    made = sample(model(), prompts())
    expected = [(prompt, index) for prompt in prompts() for index in range(3)]
    assert [(c.prompt, c.index) for c in made] == expected


@pytest.mark.parametrize("factory", [tiny_llama, tiny_gpt2])
def test_greedy_completions_are_those_of_generate(factory: Any) -> None:
    policy = model(factory).eval()
    made = sample(policy, prompts(), samples=1, temperature=0.0)
    for prompt, completion in zip(prompts(), made, strict=True):
        tokens = torch.tensor([prompt.ids])
        row = policy.generate(
            tokens, attention_mask=torch.ones_like(tokens), do_sample=False, max_new_tokens=12
        )
        assert completion.ids == tuple(row[0, len(prompt.ids) :].tolist())


@pytest.mark.parametrize("factory", [tiny_llama, tiny_gpt2])
@pytest.mark.parametrize("temperature", [0.0, 0.5, 1.0])
def test_the_recorded_log_probabilities_are_the_models_own(
    factory: Any, temperature: float
) -> None:
    policy = model(factory)
    made = sample(policy, prompts(), temperature=temperature)
    scored = score_completions(policy.eval(), made, pad_id=PAD)
    assert [c.logps for c in made] == pytest.approx(scored.tolist(), abs=1e-4)
    assert scored.std() > 0.1


def test_a_temperature_of_one_half_draws_as_twice_the_logits_do() -> None:
    policy = model()
    made = sample(policy, prompts(), temperature=0.5)
    # a head of twice the size computes twice the logits
    policy.get_output_embeddings().weight.data *= 2
    assert ids(sample(policy, prompts())) == ids(made)


@pytest.mark.parametrize(
    "setting",
    [
        {"repetition_penalty": 1.8},
        {"min_new_tokens": 6},
        {"no_repeat_ngram_size": 1},
        {"suppress_tokens": [EOS, 7, 8]},
        {"do_sample": True, "top_k": 3, "temperature": 0.3},
        {"num_beams": 2},
    ],
)
def test_what_the_model_asks_of_generate_does_not_bend_the_distribution(
    setting: dict[str, Any],
) -> None:
    plain = sample(model(), prompts())
    for policy in (model(), get_peft_model(model(), LoraConfig(task_type="CAUSAL_LM"))):
        asked = policy.generation_config
        asked.update(**setting)
        made = sample(policy, prompts())
        assert ids(made) == ids(plain)
        assert [c.logps for c in made] == pytest.approx([c.logps for c in plain], abs=1e-4)
        assert policy.generation_config is asked


def test_a_completion_ends_with_its_only_end_token() -> None:
    policy = model(scale=2.0)
    made = sample(policy, prompts(20), samples=5, max_new_tokens=20)
    finished = [c for c in made if c.finished]
    cut = [c for c in made if not c.finished]
    assert finished
    assert cut
    assert all(c.ids.count(EOS) == 1 and c.ids[-1] == EOS for c in finished)
    assert all(EOS not in c.ids and len(c.ids) == 20 for c in cut)
    assert {len(c.ids) for c in finished} - {20}
    for completion in made:
        assert completion.text == TOKENIZER.decode(list(completion.ids), skip_special_tokens=True)
        assert "<eos>" not in completion.text


def test_an_end_token_that_pads_too_is_kept_once() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = "<eos>"
    policy = model(scale=2.0)
    asked = prompts(10)
    made = sample_completions(
        policy, tokenizer, asked, samples=4, max_new_tokens=20, key="0/1/train"
    )
    assert any(c.finished for c in made)
    assert all(c.ids.count(EOS) == c.finished for c in made)
    scored = score_completions(policy.eval(), made, pad_id=EOS)
    assert [c.logps for c in made] == pytest.approx(scored.tolist(), abs=1e-4)


def test_the_models_further_end_tokens_count() -> None:
    policy = model(scale=2.0)
    policy.generation_config.eos_token_id = [EOS, 9, 10]
    made = sample(policy, prompts(10), max_new_tokens=20)
    assert {c.ids[-1] for c in made if c.finished} > {EOS}
    for completion in made:
        assert sum(token in (EOS, 9, 10) for token in completion.ids) == completion.finished


def test_a_batch_that_does_not_fit_is_halved_and_nothing_changes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    policy = model()
    expected = sample(policy, prompts())
    rows: list[int] = []
    generate = policy.generate

    def tight(input_ids: Tensor, **settings: Any) -> Tensor:
        rows.append(len(input_ids))
        if len(input_ids) > 4:
            raise torch.OutOfMemoryError
        tokens: Tensor = generate(input_ids=input_ids, **settings)  # type: ignore[operator]
        return tokens

    monkeypatch.setattr(policy, "generate", tight)
    made = sample(policy, prompts(), batch_size=15)
    assert rows == [15, 7, 3, 3, 3, 3, 3]
    assert ids(made) == ids(expected)


def test_a_single_row_that_does_not_fit_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(**_: Any) -> Tensor:
        raise torch.OutOfMemoryError

    policy = model()
    monkeypatch.setattr(policy, "generate", full)
    with pytest.raises(torch.OutOfMemoryError):
        sample(policy, prompts())


@pytest.mark.parametrize("training", [True, False])
def test_sampling_is_without_dropout_and_leaves_the_mode(training: bool) -> None:
    policy = model(tiny_gpt2).train(training)
    made = sample(policy, prompts())
    assert policy.training == training
    assert made == sample(policy.eval(), prompts())


def test_no_prompt_gives_no_completion() -> None:
    assert sample(model(), []) == []


def test_draws_follow_the_softmax() -> None:
    probabilities = torch.tensor([0.4, 0.25, 0.15, 0.1, 0.06, 0.04])
    draws = 20_000
    keys = [f"0/{index}" for index in range(draws)]
    draw = KeyedSampling(keys, 3, 1.0, torch.device("cpu"))
    scores = probabilities.log().expand(draws, -1)
    picked = draw(torch.zeros(draws, 3, dtype=torch.long), scores).argmax(-1)
    counts = picked.bincount(minlength=6).double()
    statistic = float(((counts - draws * probabilities).square() / (draws * probabilities)).sum())
    assert statistic < chi2.isf(1e-3, df=5)
    torch.testing.assert_close(draw.logps[0], probabilities.log()[picked])


def test_draws_follow_the_softmax_over_positions_of_one_row() -> None:
    probabilities = torch.tensor([0.5, 0.3, 0.2])
    key, draws = torch.tensor([123456789]), 4_000
    noise = torch.cat([gumbel_noise(key, position, 3) for position in range(draws)])
    counts = (probabilities.log() + noise).argmax(-1).bincount(minlength=3).double()
    statistic = float(((counts - draws * probabilities).square() / (draws * probabilities)).sum())
    assert statistic < chi2.isf(1e-3, df=2)


def test_the_noise_is_gumbels() -> None:
    generator = torch.Generator().manual_seed(0)
    keys = torch.randint(-(2**62), 2**62, (200,), generator=generator)
    noise = gumbel_noise(keys, 0, 100)
    assert noise.dtype == torch.float32
    assert noise.isfinite().all()
    assert kstest(noise.flatten().numpy(), "gumbel_r").pvalue > 1e-3
    # neighbours in token, position and key are unrelated
    for other in (noise[:, 1:], gumbel_noise(keys, 1, 100)[:, :-1], gumbel_noise(keys + 1, 0, 99)):
        correlation = torch.stack([noise[:, :-1].flatten(), other.flatten()]).corrcoef()[0, 1]
        assert abs(float(correlation)) < 4 / (200 * 99) ** 0.5


def test_the_noise_is_the_same_on_every_machine() -> None:
    # a golden value: a changed hash would silently change every finished run's resumed samples
    noise = gumbel_noise(torch.tensor([1, -1]), 2, 3)
    expected = reference_noise(1, 2, 3) + reference_noise(-1, 2, 3)
    torch.testing.assert_close(noise.flatten(), torch.tensor(expected))


def reference_noise(key: int, position: int, vocabulary: int) -> list[float]:
    """The same in Python's integers."""
    from math import log

    mask, weyl = (1 << 64) - 1, 0x9E3779B97F4A7C15

    def mix(x: int) -> int:
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
        return x ^ (x >> 31)

    row = mix((key + (position + 1) * weyl) & mask)
    bits = [mix((row + token * weyl) & mask) >> 11 for token in range(vocabulary)]
    return [-log(-log((b + 0.5) * 2.0**-53)) for b in bits]
