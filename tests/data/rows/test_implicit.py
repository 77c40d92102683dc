from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tpmm_pl.data.rows.implicit import hh_turns, shared_text, shared_turns
from tpmm_pl.types import InputError

HH = "\n\nHuman: hi\n\nAssistant: yes?\n\nHuman: 2 + 2?\n\nAssistant: 4"


def turn(role: str, text: str) -> dict[str, str]:
    return {"role": role, "content": text}


def test_a_text_of_humans_and_assistants_is_a_conversation() -> None:
    turns = [turn("user", "hi"), turn("assistant", "yes?"), turn("user", "2 + 2?")]
    assert hh_turns(HH, "d") == (*turns, turn("assistant", "4"))
    assert hh_turns(f"{HH}\n\nHuman: x\n\nAssistant: ", "d", answered=False) == (
        *turns,
        turn("assistant", "4"),
        turn("user", "x"),
    )


@pytest.mark.parametrize("text", ["", "hello", "Human: hi", "x Human: a\n\nAssistant: b", "\n\n"])
def test_other_texts_are_no_conversation(text: str) -> None:
    assert hh_turns(text, "d") is None


def test_an_empty_turn_is_named() -> None:
    with pytest.raises(InputError, match=r"^d: chosen: turn 2, the assistant's, is empty; fill"):
        hh_turns("\n\nHuman: hi\n\nAssistant: ", "d: chosen")


def test_the_last_turn_is_an_answer_even_if_it_is_shared() -> None:
    asked, said = turn("user", "a"), turn("assistant", "b")
    assert shared_turns((asked, said), (asked, said), "d") == ((asked,), (said,), (said,))
    longer = (asked, said, asked, said)
    assert shared_turns((asked, said), longer, "d") == ((asked,), (said,), longer[1:])
    with pytest.raises(InputError, match=r"d: chosen and rejected do not begin with the same tur"):
        shared_turns((said,), (said,), "d")


@pytest.mark.parametrize(
    ("chosen", "rejected", "expected"),
    [
        ("The sky is blue", "The sky is green", ("The sky is", " blue", " green")),
        ("The sky is blue", "The sky is black", ("The sky is", " blue", " black")),
        ("The sky", "The sky is black", ("The", " sky", " sky is black")),
        ("The sky ", "The sky is black", ("The", " sky ", " sky is black")),
        ("Q: a\n\nA: yes", "Q: a\n\nA: no", ("Q: a\n\nA:", " yes", " no")),
        ("a b", "a b", ("a b", "", "")),
    ],
)
def test_the_prompt_ends_where_a_word_ends(
    chosen: str, rejected: str, expected: tuple[str, str, str]
) -> None:
    assert shared_text(chosen, rejected, "d") == expected


@pytest.mark.parametrize(("good", "bad"), [("blue", "green"), ("4", "5 or 6")])
def test_trl_finds_the_same_prompts(good: str, bad: str) -> None:
    trl = pytest.importorskip("trl.data_utils")
    asked, said = "The sky is", [turn("user", "a"), turn("assistant", "b"), turn("user", "c")]
    texts = trl.extract_prompt({"chosen": f"{asked} {good}", "rejected": f"{asked} {bad}"})
    assert shared_text(f"{asked} {good}", f"{asked} {bad}", "d") == tuple(
        texts[name] for name in ("prompt", "chosen", "rejected")
    )
    chosen, rejected = ([*said, turn("assistant", text)] for text in (good, bad))
    turns = trl.extract_prompt({"chosen": chosen, "rejected": rejected})
    assert shared_turns(tuple(chosen), tuple(rejected), "d") == tuple(
        tuple(turns[name]) for name in ("prompt", "chosen", "rejected")
    )


@pytest.mark.parametrize(("a", "b"), [("yes", "no"), ("yes", "yes sir"), (" a", " b")])
def test_texts_that_share_no_word_are_refused(a: str, b: str) -> None:
    with pytest.raises(InputError, match=r"^d: no prompt, and chosen and rejected do not begin"):
        shared_text(a, b, "d")


@given(st.text("ab \n", min_size=1), st.text("ab \n", min_size=1), st.text("ab \n"))
@settings(deadline=None, max_examples=200)
def test_no_character_is_lost(a: str, b: str, shared: str) -> None:
    chosen, rejected = shared + a, shared + b
    try:
        prompt, first, second = shared_text(chosen, rejected, "d")
    except InputError:
        return
    assert (prompt + first, prompt + second) == (chosen, rejected)
    assert chosen == rejected or not chosen.strip() or (first.strip() and second.strip())
