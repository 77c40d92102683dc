from __future__ import annotations

from itertools import product
from typing import Any

import pytest
from tokenizers import AddedToken
from tokenizers.normalizers import Prepend
from tokenizers.pre_tokenizers import ByteLevel, Metaspace
from transformers import PreTrainedTokenizerFast

from tests.data.tokens.byte_level import ADDS, BOS_ID, EOS_ID, START_ID, byte_tokenizer
from tpmm_pl.data.tokens.encoding import (
    encode,
    encode_all,
    encode_continuations,
    encode_plain_prompts,
    ended,
    unended,
)

(LETTER_H,), (LETTER_I,), (NEWLINE,) = (encode(one, byte_tokenizer()) for one in "hi\n")


def test_equal_texts_are_encoded_once_and_all_in_one_call() -> None:
    calls = []

    class Counting:
        def __call__(self, texts: list[str], **settings: Any) -> dict[str, list[list[int]]]:
            calls.append(texts)
            return {"input_ids": [[len(text)] for text in texts]}

    found = encode_all(["a", "bb", "a"], Counting())  # type: ignore[arg-type]
    assert found == {"a": (1,), "bb": (2,)}
    assert calls == [["a", "bb"]]
    assert encode_all([], Counting()) == {}  # type: ignore[arg-type]
    assert len(calls) == 1


@pytest.mark.parametrize("adds", ADDS)
def test_a_plain_prompt_begins_once_and_does_not_end(adds: str) -> None:
    begin = (BOS_ID,) if adds in ("its beginning", "both") else ()
    texts = ["hi", "<bos>hi", "hi<end>", "<end>", "<bos>", ""]
    assert encode_plain_prompts(texts, byte_tokenizer(adds)) == {
        "hi": (*begin, LETTER_H, LETTER_I),
        "<bos>hi": (BOS_ID, LETTER_H, LETTER_I),
        "hi<end>": (*begin, LETTER_H, LETTER_I, EOS_ID),
        "<end>": (*begin, EOS_ID),
        "<bos>": (BOS_ID,),
        "": (),
    }


def test_a_beginning_that_is_also_the_end_comes_once() -> None:
    tokenizer = byte_tokenizer("its beginning")
    tokenizer.eos_token = "<bos>"  # as OPT has it
    texts = ["hi", "<bos>hi"]
    assert {*encode_plain_prompts(texts, tokenizer).values()} == {(BOS_ID, LETTER_H, LETTER_I)}


def continuation(prompt: str, text: str, tokenizer: PreTrainedTokenizerFast) -> tuple[int, ...]:
    prompts = encode_all([prompt], tokenizer)
    return encode_continuations([(prompt, text)], prompts, tokenizer)[prompt, text]


def test_a_continuation_is_what_follows_the_prompts_tokens() -> None:
    assert continuation("<start>h\n", "hi<end>", byte_tokenizer()) == (LETTER_H, LETTER_I, EOS_ID)


def test_a_token_that_spans_the_border_is_split_there() -> None:
    tokenizer = byte_tokenizer()
    (both,) = encode("\n\n", tokenizer)
    assert encode("<start>\n\n<end>", tokenizer) == (START_ID, both, EOS_ID)
    assert continuation("<start>\n", "\n<end>", tokenizer) == (NEWLINE, EOS_ID)


def prepending(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.backend_tokenizer.normalizer = Prepend("▁")  # as Llama 2 has it


def marking_the_first_word(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.backend_tokenizer.pre_tokenizer = Metaspace(prepend_scheme="first")


def eating_blanks(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.add_tokens([AddedToken("<eats>", normalized=False, lstrip=True, rstrip=True)])


def overlapping(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.add_tokens([AddedToken("x<start>h", normalized=False), AddedToken("<start>h")])
    tokenizer.backend_tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=True)


def whole_words_only(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.add_tokens([AddedToken("hi", single_word=True), AddedToken("<end>h")])


@pytest.mark.parametrize(
    "change", [prepending, marking_the_first_word, eating_blanks, overlapping, whole_words_only]
)
def test_what_stands_before_the_last_control_token_may_be_left_out(change: Any) -> None:
    tokenizer = byte_tokenizer()
    change(tokenizer)
    prompts = [
        "<start>user\n the hi<end>\n<start>assistant\n",
        "the hi <end> the <eats> ",
        "the x<start>h",
        "the x<start>",
        "x<start>h ell",
        "hi",
        "<end>",
    ]
    texts = ["hi<end>", " the", "\nhell<end>\n", "hx<start>h", "<eats> hi"]
    fitting = 0
    for prompt, text in product(prompts, texts):
        ids, together = encode(prompt, tokenizer), encode(prompt + text, tokenizer)
        fits = together[: len(ids)] == ids
        fitting += fits
        expected = together[len(ids) :] if fits else encode(text, tokenizer)
        assert continuation(prompt, text, tokenizer) == expected
    assert fitting > len(prompts) * len(texts) / 2


def test_prompts_with_and_without_control_tokens_go_together() -> None:
    tokenizer = byte_tokenizer()
    given = [(prompt, "hi") for prompt in ("<start>h", "h", "<end>h")]
    prompts = encode_all((prompt for prompt, _ in given), tokenizer)
    found = encode_continuations(given, prompts, tokenizer)
    assert found == dict.fromkeys(given, (LETTER_H, LETTER_I))


def test_ends_come_once_or_not_at_all() -> None:
    assert ended((5, 1, 1), 1) == ended((5,), 1) == (5, 1)
    assert ended((), 1) == (1,)
    assert unended((1, 5, 1, 1), 1) == (1, 5)
    assert unended((5, 1), None) == (5, 1)
