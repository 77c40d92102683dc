from __future__ import annotations

from typing import Any

import pytest

from tpmm_pl.toy.letters import split_of
from tpmm_pl.toy.module import LettersData
from tpmm_pl.toy.tokenizer import letters_tokenizer
from tpmm_pl.types import InputError, OffersPairs, OffersPrompts, Prompt


def data(seed: int, monkeypatch: pytest.MonkeyPatch, **settings: Any) -> LettersData:
    monkeypatch.setenv("PL_GLOBAL_SEED", str(seed))
    made = LettersData(
        prompts_per_round=9,
        start_fuse_prompts=7,
        fuse_prompts_per_round=5,
        evaluation_prompts=6,
        **settings,
    )
    made.tokenizer = letters_tokenizer()
    return made


def texts(prompts: list[Prompt]) -> list[str]:
    return [prompt.text for prompt in prompts]


def test_counts_are_those_of_the_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    letters = data(0, monkeypatch)
    assert [len(letters.train_prompts(index)) for index in (1, 2)] == [9, 9]
    assert [len(letters.fuse_prompts(index)) for index in (0, 1, 2)] == [7, 5, 5]
    assert {d: len(p) for d, p in letters.eval_prompts().items()} == {
        "in_domain": 6,
        "out_of_domain": 6,
    }


def test_uses_never_share_a_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    letters = data(0, monkeypatch)
    evaluated = [text for prompts in letters.eval_prompts().values() for text in texts(prompts)]
    assert {split_of(text) for text in texts(letters.train_prompts(1))} == {"train"}
    assert {split_of(text) for text in texts(letters.fuse_prompts(1))} == {"fuse"}
    assert {split_of(text) for text in evaluated} == {"eval"}


def test_prompts_follow_the_runs_seed_and_those_of_evaluation_do_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    first = data(0, monkeypatch)
    trained, evaluated = first.train_prompts(1), first.eval_prompts()
    assert first.train_prompts(1) == trained
    assert first.train_prompts(2) != trained
    other = data(1, monkeypatch)
    assert texts(other.train_prompts(1)) != texts(trained)
    assert other.eval_prompts() == evaluated


def test_letters_offer_prompts_and_no_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    letters = data(0, monkeypatch)
    assert isinstance(letters, OffersPrompts)
    assert not isinstance(letters, OffersPairs)
    assert letters.eval_pairs() == {}


def test_a_batch_has_at_least_one_pair(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="batch_size is 0"):
        data(0, monkeypatch, batch_size=0)
