"""Rows to texts: what chat templates write of prompts and answers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from operator import add
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from tpmm_pl.data.rows.formats import RawPair, RawPrompt
from tpmm_pl.data.rows.messages import Content, Message
from tpmm_pl.types import InputError


class PairTexts(NamedTuple):
    """A prompt and its two completions, as the model sees them; completions without their end."""

    prompt: str
    chosen: str
    rejected: str
    templated: bool = False
    """Whether a template wrote them: then the prompt brings its own special tokens."""

    @property
    def answers(self) -> tuple[str, str]:
        """The completions."""
        return self.chosen, self.rejected


def prompt_text(row: RawPrompt, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a prompt as the model sees it, up to where the answer begins.

    Raises:
        InputError: As :func:`render`.
    """
    if isinstance(row.prompt, str):
        return row.prompt
    return render(row.prompt, tokenizer, row.where, tools=row.tools, answer_next=True)


def pair_texts(
    row: RawPair, tokenizer: PreTrainedTokenizerBase, *, whole_turns: bool = False
) -> PairTexts:
    """Return the texts of a pair, as :func:`all_pair_texts` does."""
    return all_pair_texts([row], tokenizer, whole_turns=whole_turns)[0]


def all_pair_texts(
    rows: Sequence[RawPair], tokenizer: PreTrainedTokenizerBase, *, whole_turns: bool = False
) -> list[PairTexts]:
    """Return the texts of every pair.

    Args:
        rows: Plain or conversational.
        tokenizer: Its template writes conversations.
        whole_turns: Whether plain texts are turns where there is a template, and what it writes
            behind an answer, an end-of-sequence token and often a newline, is kept.

    Raises:
        InputError: As :func:`render`; or if the template does not show a prompt as the beginning
            of its conversation.
    """
    if whole_turns and tokenizer.chat_template:
        rows = [_as_turns(row) for row in rows]
    turns = [row for row in rows if not isinstance(row.prompt, str)]
    written = _written(turns, tokenizer, "" if whole_turns else str(tokenizer.eos_token))
    return [
        PairTexts(row.prompt, str(row.chosen), str(row.rejected))
        if isinstance(row.prompt, str)
        else next(written)
        for row in rows
    ]


def render(
    messages: Sequence[Message],
    tokenizer: PreTrainedTokenizerBase,
    where: str,
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    answer_next: bool = False,
) -> str:
    """Apply the tokenizer's chat template to a conversation.

    Args:
        messages: Its turns.
        tokenizer: Has the template.
        where: File and line, for messages.
        tools: JSON schemas of the functions that the assistant may call.
        answer_next: Whether to write the beginning of the assistant's next turn.

    Raises:
        InputError: If there is no template, or it refuses the conversation.
    """
    if not tokenizer.chat_template:
        raise InputError(
            f"{where} is a conversation, but the tokenizer has no chat template;"
            " give one with chat_template, or use plain texts"
        )
    try:
        text = tokenizer.apply_chat_template(
            [dict(message) for message in messages],
            tools=None if tools is None else [dict(tool) for tool in tools],
            tokenize=False,
            add_generation_prompt=answer_next,
        )
    # a template is a program of the user's: it may refuse, and it may fail in any other way
    except Exception as error:
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise InputError(
            f"{where}: the chat template refuses the conversation ({reason}); change the row, or"
            " give another chat_template"
        ) from error
    return str(text)


def _as_turns(row: RawPair) -> RawPair:
    if not isinstance(row.prompt, str):
        return row
    asked: Message = {"role": "user", "content": row.prompt}
    chosen, rejected = (
        ({"role": "assistant", "content": str(answer)},) for answer in (row.chosen, row.rejected)
    )
    return replace(row, prompt=(asked,), chosen=chosen, rejected=rejected)


def _written(
    rows: Sequence[RawPair], tokenizer: PreTrainedTokenizerBase, end: str
) -> Iterator[PairTexts]:
    asked = [_turns(row.prompt) for row in rows]
    prompts = _rendered(rows, asked, tokenizer, answer_next=True)
    answered = [
        _rendered(rows, list(map(add, asked, answers)), tokenizer)
        for answers in ([_turns(r.chosen) for r in rows], [_turns(r.rejected) for r in rows])
    ]
    for row, prompt, *wholes in zip(rows, prompts, *answered, strict=True):
        chosen, rejected = (_without_end(_behind(prompt, one, row.where), end) for one in wholes)
        yield PairTexts(prompt, chosen, rejected, templated=True)


def _turns(content: Content) -> tuple[Message, ...]:
    return () if isinstance(content, str) else content


def _rendered(
    rows: Sequence[RawPair],
    conversations: Sequence[Sequence[Message]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    answer_next: bool = False,
) -> list[str]:
    if conversations and tokenizer.chat_template and not any(row.tools for row in rows):
        # in one call it costs less; if it fails, one by one tells which row is at fault
        with suppress(Exception):
            found = tokenizer.apply_chat_template(
                [[dict(message) for message in messages] for messages in conversations],
                tokenize=False,
                add_generation_prompt=answer_next,
            )
            return list(map(str, found))
    return [
        render(messages, tokenizer, row.where, tools=row.tools, answer_next=answer_next)
        for row, messages in zip(rows, conversations, strict=True)
    ]


def _behind(prompt: str, whole: str, where: str) -> str:
    if not whole.startswith(prompt):
        raise InputError(
            f"{where}: the chat template writes the prompt differently once it is answered, so"
            " the completion cannot be told from it; give a chat_template without such a step"
            " (often one that adds or removes reasoning)"
        )
    return whole[len(prompt) :]


def _without_end(text: str, end: str) -> str:
    # templates close a turn with the end token and a newline, a model stops at the token
    head, found, tail = text.rpartition(end) if end else (text, "", "")
    return head if found and not tail.strip() else text
