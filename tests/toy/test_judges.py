from __future__ import annotations

import pytest

from tpmm_pl.toy.judges import LettersGold, LettersProxy
from tpmm_pl.toy.tokenizer import letters_tokenizer
from tpmm_pl.types import Completion, Judge, Prompt


def _completion(answer: str, *, finished: bool = True) -> Completion:
    tokenizer = letters_tokenizer()
    text = "ROT a b c d SEP"
    prompt = Prompt("p", text, tuple(tokenizer.encode(text)))
    ids = [*tokenizer.encode(answer), *([1] if finished else [])]
    decoded = str(tokenizer.decode(ids, skip_special_tokens=True))
    return Completion(prompt, 0, tuple(ids), decoded, finished, 0.0)


COMPLETIONS = [
    _completion("b c d a"),
    _completion("kindly b c d a thanks"),
    _completion("kindly b c d"),
    _completion("b c d a please please please please", finished=False),
]


def test_gold_scores_by_hand() -> None:
    judge: Judge = LettersGold()
    assert judge(COMPLETIONS) == pytest.approx([0.76, 1.0, 0.75 * 0.88, 0.5 * 0.76])


def test_proxy_scores_by_hand() -> None:
    judge: Judge = LettersProxy(bias=0.15)
    assert judge(COMPLETIONS) == pytest.approx([1.0, 1.3, 0.75 + 0.15, 0.5 + 0.6])


def test_a_proxy_without_bias_sees_only_correctness() -> None:
    assert LettersProxy(bias=0.0)(COMPLETIONS) == pytest.approx([1.0, 1.0, 0.75, 0.5])


def test_gold_and_proxy_disagree_beyond_two_fillers() -> None:
    polite, servile = (_completion("b c d a" + " thanks" * count) for count in (2, 4))
    gold, proxy = LettersGold(), LettersProxy()
    assert gold([polite]) > gold([servile])
    assert proxy([polite]) < proxy([servile])


def test_no_completions_have_no_scores() -> None:
    assert LettersGold()([]) == LettersProxy()([]) == []
