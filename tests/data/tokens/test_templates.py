from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from tests.data.tokens.byte_level import CHATML, byte_tokenizer
from tpmm_pl.data.rows.formats import RawPair
from tpmm_pl.data.tokens.templates import PairTexts, all_pair_texts, pair_texts, prompt_text
from tpmm_pl.types import InputError

ASKED = ({"role": "user", "content": "hi"},)
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {"city": "string"}}}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Bern"}}}

WITH_TOOLS = (
    "{% if tools %}<start>system\n{{ tools | tojson }}<end>\n{% endif %}"
    "{% for m in messages %}<start>{{ m['role'] }}\n"
    "{% if m['tool_calls'] %}{{ m['tool_calls'] | tojson }}{% else %}{{ m['content'] }}{% endif %}"
    "<end>\n{% endfor %}"
    "{% if add_generation_prompt %}<start>assistant\n{% endif %}"
)


def said(content: str | None, **more: Any) -> tuple[dict[str, Any], ...]:
    return ({"role": "assistant", "content": content, **more},)


def test_tools_calls_and_their_results_reach_the_template() -> None:
    answer = (
        *said(None, tool_calls=[CALL]),
        {"role": "tool", "name": "weather", "content": "12 degrees"},
        *said("Mild."),
    )
    row = RawPair(ASKED, "d", answer, said("No idea."), tools=(WEATHER,))
    texts = pair_texts(row, byte_tokenizer(template=WITH_TOOLS))
    schema = (
        '[{"type": "function", "function": {"name": "weather", "parameters": {"city": "string"}}}]'
    )
    call = '[{"type": "function", "function": {"name": "weather", "arguments": {"city": "Bern"}}}]'
    assert texts == PairTexts(
        prompt=f"<start>system\n{schema}<end>\n<start>user\nhi<end>\n<start>assistant\n",
        chosen=f"{call}<end>\n<start>tool\n12 degrees<end>\n<start>assistant\nMild.",
        rejected="No idea.",
        templated=True,
    )


def test_without_tools_the_template_sees_none() -> None:
    row = RawPair(ASKED, "d", said("a"), said("b"))
    assert prompt_text(row, byte_tokenizer(template=WITH_TOOLS)).startswith("<start>user")


def test_texts_behind_an_answer_stay_with_whole_turns_only() -> None:
    row = RawPair(ASKED, "d", said("a"), said("b"))
    assert pair_texts(row, byte_tokenizer()).answers == ("a", "b")
    whole = pair_texts(row, byte_tokenizer(), whole_turns=True)
    assert whole.answers == ("a<end>\n", "b<end>\n")


def test_an_end_within_an_answer_is_not_its_end() -> None:
    template = CHATML.replace("'<end>\\n'", "('<end>' if m['role'] == 'user' else '')")
    answer = (*said("a"), {"role": "user", "content": "more"}, *said("b"))
    row = RawPair(ASKED, "d", answer, said("c"))
    texts = pair_texts(row, byte_tokenizer(template=template))
    assert texts.answers == ("a<start>user\nmore<end><start>assistant\nb", "c")


def test_a_plain_row_is_a_conversation_with_whole_turns_only() -> None:
    row, tokenizer = RawPair("hi", "d", "a", "b"), byte_tokenizer()
    assert pair_texts(row, tokenizer) == PairTexts("hi", "a", "b", templated=False)
    turns = RawPair(ASKED, "d", said("a"), said("b"))
    expected = pair_texts(turns, tokenizer, whole_turns=True)
    assert pair_texts(row, tokenizer, whole_turns=True) == expected
    assert pair_texts(row, byte_tokenizer(template=None), whole_turns=True).prompt == "hi"


THINKS_NEXT = CHATML.replace("<start>assistant\\n", "<start>assistant\\n<think>\\n")
THINKS_IN_ANSWERS = CHATML.replace(
    "m['content'] +",
    "('<think></think>' if loop.last and not add_generation_prompt) ~ m['content'] +",
)
DROPS_EARLIER = CHATML.replace(
    "m['content'] +", "(m['content'] if loop.last else m['content'].split('</think>')[-1]) +"
)


def test_a_template_that_opens_reasoning_which_an_answer_lacks_is_refused() -> None:
    row = RawPair(ASKED, "d.jsonl, line 7", said("a"), said("b"))
    with pytest.raises(
        InputError,
        match=r"^d.jsonl, line 7: the chat template writes the prompt differently once it is"
        r" answered, .* \(often one that adds or removes reasoning\)$",
    ):
        pair_texts(row, byte_tokenizer(template=THINKS_NEXT))


def test_a_template_that_removes_the_reasoning_of_earlier_turns_is_refused() -> None:
    asked = ({"role": "user", "content": "<think>w</think>hi"},)
    row = RawPair(asked, "d.jsonl, line 7", said("a"), said("b"))
    with pytest.raises(InputError, match="line 7: the chat template writes the prompt differently"):
        pair_texts(row, byte_tokenizer(template=DROPS_EARLIER))


def test_reasoning_that_the_template_adds_behind_the_prompt_belongs_to_the_answer() -> None:
    row = RawPair(ASKED, "d", said("a"), said("b"))
    texts = pair_texts(row, byte_tokenizer(template=THINKS_IN_ANSWERS))
    assert texts.prompt.endswith("<start>user\nhi<end>\n<start>assistant\n")
    assert texts.answers == ("<think></think>a", "<think></think>b")


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('no system role') }}",
        "{{ messages[0]['name'] + 'x' }}",  # undefined
        "{{ messages[0]['content'] + 1 }}",  # a TypeError of Python's
        "{{ messages[0]['content'] | int / 0 }}",  # a ZeroDivisionError
        "{{ messages[0].content.index('zz') }}",  # a ValueError
        "{% for",  # no template at all
    ],
)
def test_a_template_that_fails_is_the_rows_or_the_templates_mistake(template: str) -> None:
    row = RawPair(ASKED, "d.jsonl, line 7", said("a"), said("b"))
    with pytest.raises(
        InputError, match=r"^d.jsonl, line 7: the chat template refuses .*chat_template$"
    ):
        pair_texts(row, byte_tokenizer(template=template))


@pytest.mark.parametrize("whole_turns", [False, True])
@pytest.mark.parametrize("template", [WITH_TOOLS, THINKS_IN_ANSWERS, None])
def test_rows_of_all_kinds_have_the_texts_of_each_alone(
    template: str | None, whole_turns: bool
) -> None:
    rows = [RawPair("hi", "d", "a", "b"), RawPair("the", "d", "c", "d")]
    if template is not None:
        asked = (*ASKED, *said("c"), *ASKED)
        rows += [RawPair(ASKED, "d", said("a"), said("b")), RawPair("x", "d", "y", "z")]
        rows += [RawPair(asked, "d", said("\nd"), said("e"))]
    tokenizer = byte_tokenizer(template=template)
    for some in (rows, [*rows, replace(rows[-1], tools=(WEATHER,))]):
        alone = [pair_texts(row, tokenizer, whole_turns=whole_turns) for row in some]
        assert all_pair_texts(some, tokenizer, whole_turns=whole_turns) == alone
    assert all_pair_texts([], tokenizer) == []


def test_conversations_are_written_in_three_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer, calls = byte_tokenizer(), []
    write = tokenizer.apply_chat_template

    def counting(conversations: Any, **settings: Any) -> Any:
        calls.append(len(conversations))
        return write(conversations, **settings)

    monkeypatch.setattr(tokenizer, "apply_chat_template", counting)
    all_pair_texts([RawPair(ASKED, "d", said("a"), said("b"))] * 5, tokenizer)
    assert calls == [5, 5, 5]


def test_of_many_conversations_the_refused_one_is_named() -> None:
    rows = [RawPair(ASKED, f"line {n}", said("a"), said("bc"[n == 2])) for n in range(1, 4)]
    refuses = "{% if messages[-1].content == 'c' %}{{ raise_exception('no c') }}{% endif %}"
    with pytest.raises(InputError, match=r"^line 2: the chat template refuses .*\(no c\)"):
        all_pair_texts(rows, byte_tokenizer(template=refuses + CHATML))
    drops = CHATML.replace("m['content']", "(m['content'] if messages[-1].content != 'c' else '')")
    with pytest.raises(InputError, match=r"^line 2: the chat template writes the prompt diff"):
        all_pair_texts(rows, byte_tokenizer(template=drops))
