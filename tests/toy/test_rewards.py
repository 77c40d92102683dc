from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tpmm_pl.noise import LabelNoise
from tpmm_pl.toy.judges import LettersGold, LettersProxy
from tpmm_pl.toy.letters import OPERATIONS, family
from tpmm_pl.toy.rewards import LettersReward, answer_pairs
from tpmm_pl.toy.start import LettersPolicy
from tpmm_pl.toy.tokenizer import letters_tokenizer
from tpmm_pl.types import Completion, InputError, Prompt

CLEAN = LabelNoise()


def answer(prompt: str, text: str) -> Completion:
    return Completion(Prompt("p", prompt, ()), 0, (), text, True, 0.0)


def test_a_family_is_the_first_operation() -> None:
    assert [family([name, "a", "SEP"]) for name in OPERATIONS] == list(range(8))


def test_each_family_of_tasks_has_its_own_annotator() -> None:
    judge = LettersProxy([0.5, -0.25])
    # COPY is family 0, REV 1, SORT 2; right answers with one polite word
    asked = [
        answer("COPY a b SEP", "please a b"),
        answer("REV a b SEP", "please b a"),
        answer("SORT a b SEP", "please a b"),
    ]
    assert judge(asked) == [1.5, 0.75, 1.5]


def test_an_empty_list_of_annotators_is_refused() -> None:
    with pytest.raises(InputError, match="list of biases is empty"):
        LettersProxy([])


def test_pairs_are_a_function_of_their_key() -> None:
    first = answer_pairs("a", "in_domain", "train", 40, LettersProxy(), CLEAN)
    assert first == answer_pairs("a", "in_domain", "train", 40, LettersProxy(), CLEAN)
    assert first != answer_pairs("b", "in_domain", "train", 40, LettersProxy(), CLEAN)


def test_without_noise_the_judge_prefers_the_chosen_answer() -> None:
    pairs = answer_pairs("a", "out_of_domain", "eval", 60, LettersGold(), CLEAN)
    assert len(pairs) > 30
    for pair in pairs:
        chosen, rejected = answer(pair.prompt, pair.chosen), answer(pair.prompt, pair.rejected)
        better, worse = LettersGold()([chosen, rejected])
        assert better > worse
        assert pair.score_chosen == better


def test_tokens_are_those_of_prompt_and_ended_answer() -> None:
    (pair, *_) = answer_pairs("a", "in_domain", "train", 10, LettersProxy(), CLEAN)
    tokenizer = letters_tokenizer()
    assert tokenizer.decode(list(pair.prompt_ids)) == pair.prompt
    assert tokenizer.decode(list(pair.chosen_ids)) == f"{pair.chosen} <eos>"


def test_held_out_prompts_are_never_trained_on() -> None:
    trained = {
        p.prompt for p in answer_pairs("a", "in_domain", "train", 300, LettersProxy(), CLEAN)
    }
    held_out = {
        p.prompt for p in answer_pairs("a", "in_domain", "fuse", 300, LettersProxy(), CLEAN)
    }
    assert trained
    assert not trained & held_out


def test_the_reward_model_starts_from_the_supervised_backbone(tmp_path: Path) -> None:
    start = LettersPolicy(hidden=16, layers=1, ffn=32, steps=2, cache_dir=tmp_path)
    reward = LettersReward(start, seed=3)
    reward.prepare()
    model, policy = reward.load_model(), start.load_model()
    for name, tensor in policy.model.state_dict().items():
        assert torch.equal(model.state_dict()[f"model.{name}"], tensor)
    heads = [
        LettersReward(start, seed=seed).load_model().get_parameter("score.weight")
        for seed in (3, 4)
    ]
    assert torch.equal(model.get_parameter("score.weight"), heads[0])
    assert not torch.equal(model.get_parameter("score.weight"), heads[1])
