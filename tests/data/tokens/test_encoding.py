from __future__ import annotations

from itertools import product
from typing import Any

import pytest
from tokenizers import AddedToken
from tokenizers.normalizers import Prepend
from tokenizers.pre_tokenizers import ByteLevel, Metaspace
from transformers import PreTrainedTokenizerFast

from tests.data.tokens.byte_level import ADDS, BOS_ID, EOS_ID, START_ID, byte_tokenizer
from tpmm_pl.data.tokens import encoding
from tpmm_pl.data.tokens.encoding import (
    encode,
    encode_all,
    encode_continuations,
    encode_plain_prompts,
    encode_written,
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


@pytest.mark.parametrize("adds", ADDS)
@pytest.mark.parametrize("special", [False, True])
def test_the_tokens_are_those_of_the_tokenizers_own_call(adds: str, special: bool) -> None:
    tokenizer, texts = byte_tokenizer(adds), ["<start>hi<end>\n", " the\n\nhell", "", "<bos>é"]
    expected = [tuple(tokenizer(text, add_special_tokens=special)["input_ids"]) for text in texts]
    # what the last call left behind is no part of the next one
    tokenizer(texts, padding="max_length", truncation=True, max_length=2)
    assert [*encode_all(texts, tokenizer, special=special).values()] == expected


def test_special_tokens_are_plain_text_where_the_tokenizer_says_so() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.split_special_tokens = True
    # a blank in front of every text, and not of every piece of one
    tokenizer.backend_tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=True)
    texts = ["<start>hi<end>", "<start>hi<end>\n<start>h"]
    for text, ids in encode_written(texts, tokenizer).items():
        assert EOS_ID not in ids
        assert [*ids] == tokenizer(text, add_special_tokens=False)["input_ids"]


def test_a_tokenizer_that_does_more_than_its_backend_is_asked_itself() -> None:
    class Lowering(PreTrainedTokenizerFast):
        def _encode_plus(self, text: Any, *rest: Any, **settings: Any) -> Any:
            return super()._encode_plus([one.lower() for one in text], *rest, **settings)

    backend = byte_tokenizer().backend_tokenizer
    tokenizer = Lowering(tokenizer_object=backend)  # type: ignore[no-untyped-call]
    assert encode_all(["HI"], tokenizer) == {"HI": (LETTER_H, LETTER_I)}


def letter_in_front(tokenizer: PreTrainedTokenizerFast) -> None:
    # at the end of a text it is a word of its own, in front of "zz>" it is none
    tokenizer.add_tokens([AddedToken("hi", single_word=True, normalized=False)])
    tokenizer.add_tokens([AddedToken("zz>", normalized=False)])


def normalised_first(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.add_tokens([AddedToken("zz>", normalized=True)])
    prepending(tokenizer)


def longer(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.add_tokens([AddedToken("hi<end>\n<st", normalized=False)])


@pytest.mark.parametrize(
    "change",
    [
        lambda tokenizer: None,
        prepending,
        marking_the_first_word,
        eating_blanks,
        overlapping,
        whole_words_only,
        letter_in_front,
        normalised_first,
        longer,
    ],
)
@pytest.mark.parametrize("last", ["<start>", "<end>", "<eats>", "zz>"])
def test_texts_in_pieces_have_the_tokens_of_the_whole(change: Any, last: str) -> None:
    tokenizer = byte_tokenizer()
    change(tokenizer)
    texts = [f"<start>user\n the hi<end>\n<start>hi{last}", f" hi {last} the <start>h", last]
    texts += [f"{last}{last}hi", f"x{last}h ell \n{last} hi", "hi", "", f"hi{last}\n<start>"]
    assert encode_written(texts, tokenizer) == {text: encode(text, tokenizer) for text in texts}


def test_turns_that_prompts_share_are_encoded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[list[str]] = []

    def counted(texts: Any, *rest: Any) -> dict[str, tuple[int, ...]]:
        calls.append([*dict.fromkeys(texts)])
        return encode_all(calls[-1], *rest)

    monkeypatch.setattr(encoding, "encode_all", counted)
    prompts = [f"<start>system\nhi<end>\n<start>user\n{n}<end>\n<start>assistant\n" for n in "ab"]
    written = encode_written(prompts, byte_tokenizer())
    user = [f"<start>user\n{n}<end>\n" for n in "ab"]
    system, asked = "<start>system\nhi<end>\n", "<start>assistant\n"
    assert calls == [["", system, user[0], asked, user[1]]]
    encode_continuations([(one, "x<end>") for one in prompts], written, byte_tokenizer())
    assert calls[1:] == [[f"{asked}x<end>"], [asked], []]
