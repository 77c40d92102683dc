"""Rows that bring their tokens."""

from __future__ import annotations

import pytest

from tests.models.tiny import CHAT_TEMPLATE, EOS, tiny_tokenizer
from tpmm_pl.data.rows.formats import RawPair
from tpmm_pl.data.tokens.chat import prompt_id, tokenize_pairs
from tpmm_pl.types import InputError

IDS = ((6, 7), (8, EOS), (9, 10, EOS))


def brought(ids: tuple[tuple[int, ...], ...] = IDS) -> RawPair:
    return RawPair("", "d.jsonl, line 1", ids=ids)  # type: ignore[arg-type]


def test_tokens_that_a_row_brings_are_taken_as_they_are() -> None:
    tokenizer = tiny_tokenizer()
    unended = ((EOS, 6), (7, 8), (9, EOS, EOS))
    (same, other), counts = tokenize_pairs([brought(), brought(unended)], tokenizer, max_length=9)
    assert (same.prompt_ids, same.chosen_ids, same.rejected_ids) == IDS
    assert (same.prompt, same.chosen, same.rejected) == ("w0 w1", "w2", "w3 w4")
    assert same.prompt_id == prompt_id("w0 w1")
    assert (other.prompt_ids, other.chosen_ids, other.rejected_ids) == unended
    assert (other.prompt, other.chosen, other.rejected) == ("<eos> w0", "w1 w2", "w3")
    assert not counts


def test_tokens_that_a_row_brings_need_neither_end_nor_template() -> None:
    tokenizer = tiny_tokenizer(template=False)
    tokenizer.eos_token = None
    (pair,), _ = tokenize_pairs([brought()], tokenizer, max_length=9, whole_turns=True)
    assert (pair.prompt_ids, pair.chosen_ids) == IDS[:2]
    assert pair.chosen == "w2 <eos>"


def test_tokens_that_a_row_brings_have_the_budgets_of_others() -> None:
    (pair,), counts = tokenize_pairs(
        [brought()], tiny_tokenizer(), max_length=3, max_prompt_length=1
    )
    assert (pair.prompt_ids, pair.chosen_ids, pair.rejected_ids) == ((7,), (8, EOS), (9, 10))
    assert counts == {"prompts cut off": 1, "completions cut off": 1}
    _, counts = tokenize_pairs([brought(((6,), (), (7,)))], tiny_tokenizer(), max_length=3)
    assert counts == {"dropped: completion without tokens": 1}


@pytest.mark.parametrize(
    ("ids", "found"),
    [
        (((6, 32), (7,), (8,)), "prompt_ids has the token 32"),
        (((6,), (7,), (8, 99)), "rejected_ids has the token 99"),
        (((6,), (-1,), (8,)), "chosen_ids has the token -1"),
    ],
)
def test_tokens_beyond_the_vocabulary_are_refused(
    ids: tuple[tuple[int, ...], ...], found: str
) -> None:
    with pytest.raises(
        InputError, match=f"^d.jsonl, line 1: {found}, the tokenizer's vocabulary 32 tokens; give"
    ):
        tokenize_pairs([brought(ids)], tiny_tokenizer(), max_length=9)


@pytest.mark.parametrize("templated", [False, True])
def test_a_prompt_of_tokens_and_of_text_has_one_name(templated: bool) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.bos_token = "<system>"
    tokenizer.chat_template = f"{{{{ bos_token }}}} {CHAT_TEMPLATE}"
    written = RawPair("w0 w1", "d.jsonl, line 2", "w2", "w3")
    if templated:
        asked = {"role": "user", "content": "w0 w1"}
        chosen, rejected = ({"role": "assistant", "content": word} for word in ("w2", "w3"))
        written = RawPair((asked,), "d.jsonl, line 2", (chosen,), (rejected,))
    (text,), _ = tokenize_pairs([written], tokenizer, max_length=19)
    ids = text.prompt_ids if templated else (tokenizer.bos_token_id, *text.prompt_ids)
    (given,), _ = tokenize_pairs([brought((ids, (8, EOS), (9, EOS)))], tokenizer, max_length=19)
    assert given.prompt_ids[0] == tokenizer.bos_token_id
    assert given.prompt_id == text.prompt_id
