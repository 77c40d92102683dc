from __future__ import annotations

import gc
import re
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from tests.models.tiny import EOS, tiny_gpt2, tiny_llama, tiny_tokenizer
from tpmm_pl.models.scoring import score_completions
from tpmm_pl.rollouts import sample_completions
from tpmm_pl.types import Completion, Prompt

TOKENIZER = tiny_tokenizer()

Shape = tuple[int, int]
"""Rows and tokens of a forward pass."""


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
    scored = score_completions(policy.eval(), made)
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
    scored = score_completions(policy.eval(), made)
    assert [c.logps for c in made] == pytest.approx(scored.tolist(), abs=1e-4)


def test_the_models_further_end_tokens_count() -> None:
    policy = model(scale=2.0)
    policy.generation_config.eos_token_id = [EOS, 9, 10]
    made = sample(policy, prompts(10), max_new_tokens=20)
    assert {c.ids[-1] for c in made if c.finished} > {EOS}
    for completion in made:
        assert sum(token in (EOS, 9, 10) for token in completion.ids) == completion.finished


@pytest.mark.parametrize(
    ("batch_size", "prefills"),
    [(12, [4]), (7, [2, 2]), (6, [2, 2]), (3, [1, 1, 1, 1]), (2, [1, 2, 1, 1, 2, 1])],
)
def test_samples_of_a_prompt_share_its_prefill(batch_size: int, prefills: list[int]) -> None:
    policy = model()
    memory = Memory(policy)
    made = sample(policy, prompts(5)[1:], batch_size=batch_size)
    assert [shape[0] for shape in memory.passes if _is_prefill(shape)] == prefills
    assert len(made) == 12


def test_equal_prompts_of_other_names_share_their_prefill() -> None:
    policy, first = model(), prompts()[4]
    second = replace(first, prompt_id="second", ids=first.ids[::-1])
    twins = [replace(prompt, prompt_id=f"{prompt.prompt_id} again") for prompt in (first, second)]
    memory = Memory(policy)
    made = sample(policy, [first, second, *twins], batch_size=6)
    assert [shape for shape in memory.passes if _is_prefill(shape)] == [(1, 5), (1, 5)]
    # but not their noise
    assert [c.ids for c in made[:3]] != [c.ids for c in made[6:9]]


def test_tokens_a_second_are_told(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="tpmm_pl.rollouts"):
        made = sample(model(), prompts(), title="round 3: sampling pairs")
    tokens = sum(len(completion.ids) for completion in made)
    (line,) = caplog.messages
    assert re.fullmatch(rf"round 3: sampling pairs: {tokens} tokens, [\d,]+ tokens/s", line)


def test_a_model_whose_prompts_cannot_be_shared_says_so_once_and_samples_the_same(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = sample(model(), prompts())
    monkeypatch.setattr("tpmm_pl.rollouts.sampling.shares_prefill", lambda policy: False)
    for batch_size in (15, 4):
        made = sample(model(), prompts(), batch_size=batch_size)
        assert ids(made) == ids(expected)
        assert [c.logps for c in made] == pytest.approx([c.logps for c in expected], abs=1e-4)
    lines = [line for line in capsys.readouterr().err.splitlines() if "LlamaForCausalLM" in line]
    assert lines == [
        "LlamaForCausalLM has no cache of keys and values: each sample of a prompt reads it anew"
    ]


class Memory:
    """Records a model's forward passes; those that do not fit run out of memory."""

    def __init__(
        self,
        policy: nn.Module,
        fits: Callable[[Shape], bool] = lambda shape: True,
        error: Exception | None = None,
    ) -> None:
        self.passes: list[Shape] = []
        self._fits, self._error = fits, error
        policy.register_forward_pre_hook(self._pass, with_kwargs=True)

    def _pass(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        rows, tokens = kwargs["input_ids"].shape
        self.passes.append((rows, tokens))
        if not self._fits((rows, tokens)):
            assert self._error is not None
            raise self._error


def _is_prefill(shape: Shape) -> bool:
    return shape[1] > 1


OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory"),
    RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
]


@pytest.mark.parametrize("error", OUT_OF_MEMORY)
def test_a_batch_that_does_not_fit_is_halved_and_nothing_changes(error: Exception) -> None:
    expected = sample(model(), prompts())
    policy = model()
    # prompts of 1 to 5 tokens, 3 samples each: the first pass over new tokens has all rows
    memory = Memory(policy, lambda shape: _is_prefill(shape) or shape[0] <= 4, error)
    made = sample(policy, prompts(), batch_size=15)
    assert [shape[0] for shape in memory.passes if _is_prefill(shape)] == [5, 2, 1, 1, 1, 1]
    assert max(shape[0] for shape in memory.passes[2:]) == 6
    assert ids(made) == ids(expected)


@pytest.mark.parametrize("error", OUT_OF_MEMORY)
def test_a_prefill_that_does_not_fit_is_halved_too(error: Exception) -> None:
    expected = sample(model(), prompts())
    policy = model()
    memory = Memory(policy, lambda shape: not _is_prefill(shape) or shape[0] <= 2, error)
    made = sample(policy, prompts(), batch_size=15)
    assert [shape[0] for shape in memory.passes if _is_prefill(shape)] == [5, 2, 2, 1]
    assert ids(made) == ids(expected)


@pytest.mark.parametrize("error", OUT_OF_MEMORY)
def test_a_batch_that_outgrows_the_memory_at_its_third_token_is_halved_too(
    error: Exception,
) -> None:
    expected = sample(model(), prompts())
    policy = model()
    steps = 0

    def fits(shape: Shape) -> bool:
        nonlocal steps
        steps = 0 if _is_prefill(shape) else steps + 1
        return steps < 2 or shape[0] <= 4

    memory = Memory(policy, fits, error)
    made = sample(policy, prompts(), batch_size=15)
    assert len([shape for shape in memory.passes if _is_prefill(shape)]) > 2
    assert ids(made) == ids(expected)
    assert [c.logps for c in made] == pytest.approx([c.logps for c in expected], abs=1e-4)


@pytest.mark.parametrize("at_prefill", [True, False])
def test_what_a_failed_batch_held_is_free_before_the_next_attempt(at_prefill: bool) -> None:
    policy = model()
    held: list[weakref.ref[Tensor]] = []
    alive: list[int] = []

    def hold(part: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        # two layers deep, as an activation would be when memory ends
        alive.append(sum(reference() is not None for reference in held))
        activations = output.clone()
        rows, tokens = output.shape[:2]
        if rows > 4 and _is_prefill((rows, tokens)) == at_prefill:
            held.append(weakref.ref(activations))
            raise torch.OutOfMemoryError("out of memory")

    policy.get_submodule("model.layers.1.mlp").register_forward_hook(hold)
    gc.disable()
    try:
        sample(policy, prompts(), batch_size=15)
    finally:
        gc.enable()
    assert held
    assert set(alive) == {0}


def test_the_progress_bar_counts_what_is_done_once(monkeypatch: pytest.MonkeyPatch) -> None:
    counts: list[int] = []

    class Bar(tqdm):  # type: ignore[type-arg]
        def update(self, n: float | None = 1) -> bool | None:
            counts.append(int(n or 0))
            return super().update(n)

    monkeypatch.setattr("tpmm_pl.rollouts.sampling.tqdm", Bar)
    policy = model()
    Memory(policy, lambda shape: shape[0] <= 4, torch.OutOfMemoryError("out of memory"))
    sample(policy, prompts(), batch_size=15)
    assert sum(counts) == 15
    assert max(counts) < 15


@pytest.mark.parametrize("error", OUT_OF_MEMORY)
def test_a_single_row_that_does_not_fit_is_an_error(error: Exception) -> None:
    policy = model()
    memory = Memory(policy, lambda shape: False, error)
    with pytest.raises(RuntimeError, match="memory"):
        sample(policy, prompts())
    assert len(memory.passes) == 4


def test_another_error_is_not_taken_for_a_lack_of_memory() -> None:
    policy = model()
    memory = Memory(policy, lambda shape: False, RuntimeError("shapes do not match"))
    with pytest.raises(RuntimeError, match="shapes"):
        sample(policy, prompts())
    assert len(memory.passes) == 1


@pytest.mark.parametrize("training", [True, False])
def test_sampling_is_without_dropout_and_leaves_the_mode(training: bool) -> None:
    policy = model(tiny_gpt2).train(training)
    made = sample(policy, prompts())
    assert policy.training == training
    assert made == sample(policy.eval(), prompts())


def test_no_prompt_gives_no_completion() -> None:
    assert sample(model(), []) == []
