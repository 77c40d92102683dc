"""Raw rows to tokens: chat templates, end-of-sequence tokens, length budgets."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from hashlib import sha256
from typing import NamedTuple

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from tpmm_pl.data.formats import Content, Message, RawPair, RawPrompt
from tpmm_pl.types import Completion, InputError, Pair, Prompt

Ids = tuple[int, ...]


class _Answer(NamedTuple):
    text: str
    ids: Ids


def prompt_id(text: str) -> str:
    """Return the name of a prompt: 16 hexadecimal digits of the SHA-256 of its text."""
    return sha256(text.encode()).hexdigest()[:16]


def tokenize_pairs(
    rows: Sequence[RawPair],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    max_prompt_length: int | None = None,
    whole_turns: bool = False,
) -> tuple[list[Pair], Counter[str]]:
    """Apply template and tokenizer; ``prompt_ids + chosen_ids`` is what the model sees.

    Completions end in the end-of-sequence token exactly once, unless they are cut off. A prompt
    over its budget keeps its end, a completion its start; the texts stay whole.

    Args:
        rows: Plain or conversational pairs.
        tokenizer: The policy's; with a chat template for conversations.
        max_length: Tokens of prompt and completion together.
        max_prompt_length: Tokens of the prompt; ``None``: up to ``max_length``.
        whole_turns: As :func:`judged_ids` reads: plain texts are turns where there is a template,
            and what it writes behind an answer, often a newline, is kept.

    Returns:
        The pairs that are left, and counts of what was cut off or dropped, by reason.

    Raises:
        InputError: If the tokenizer has no end-of-sequence token or no template, or the template
            does not show a prompt as the beginning of its conversation.
    """
    budget = max_length if max_prompt_length is None else min(max_prompt_length, max_length)
    pairs, counts = [], Counter[str]()
    for given in rows:
        row = _as_turns(given) if whole_turns and tokenizer.chat_template else given
        text, ids = _prompt(row, tokenizer)
        chosen, rejected = (
            _answer(row, text, ids, answer, tokenizer, whole_turns)
            for answer in (row.chosen, row.rejected)
        )
        kept = _keep_end(ids, budget)
        room = max_length - len(kept)
        counts["prompts cut off"] += len(kept) < len(ids)
        if not kept or room == 0:
            reason = "completion empty after truncation" if kept else "prompt without tokens"
            counts[f"dropped: {reason}"] += 1
            continue
        if chosen.ids[:room] == rejected.ids[:room]:
            counts["dropped: chosen and rejected have the same tokens"] += 1
            continue
        counts["completions cut off"] += sum(len(one.ids) > room for one in (chosen, rejected))
        pairs.append(
            Pair(
                prompt_id=prompt_id(text),
                prompt=text,
                chosen=chosen.text,
                rejected=rejected.text,
                prompt_ids=kept,
                chosen_ids=chosen.ids[:room],
                rejected_ids=rejected.ids[:room],
                score_chosen=row.score_chosen,
                score_rejected=row.score_rejected,
                margin=row.margin,
            )
        )
    return pairs, +counts


def tokenize_prompts(
    rows: Sequence[RawPrompt], tokenizer: PreTrainedTokenizerBase, max_prompt_length: int
) -> list[Prompt]:
    """Apply template and tokenizer to prompts; a prompt over the budget keeps its end.

    Raises:
        InputError: If the tokenizer has no template for a conversation, or makes no token of a
            prompt.
    """
    prompts = []
    for row in rows:
        text, ids = _prompt(row, tokenizer)
        if not ids:
            raise InputError(f"{row.where}: the tokenizer makes no token of the prompt; delete it")
        messages = None if isinstance(row.prompt, str) else row.prompt
        kept = _keep_end(ids, max_prompt_length)
        prompts.append(Prompt(prompt_id(text), text, kept, messages))
    return prompts


def judged_ids(completion: Completion, tokenizer: PreTrainedTokenizerBase) -> Ids:
    """Return what a reward model with this tokenizer reads of a completion in its conversation.

    With a chat template: the whole conversation through it; a plain prompt is a user's turn.
    Without: the prompt's text, the completion's, and the end-of-sequence token if it was sampled.
    """
    prompt = completion.prompt
    if tokenizer.chat_template:
        messages = prompt.messages or ({"role": "user", "content": prompt.text},)
        answer = {"role": "assistant", "content": completion.text}
        return _encode(_render((*messages, answer), tokenizer, prompt.prompt_id), tokenizer)
    _, ids = _prompt(RawPrompt(prompt.text), tokenizer)
    own = _encode(completion.text, tokenizer)
    ends = completion.finished and tokenizer.eos_token_id is not None
    return (*ids, *(_ended(own, tokenizer) if ends else own))


def _as_turns(row: RawPair) -> RawPair:
    if not isinstance(row.prompt, str):
        return row
    asked: Message = {"role": "user", "content": row.prompt}
    chosen, rejected = (
        ({"role": "assistant", "content": str(answer)},) for answer in (row.chosen, row.rejected)
    )
    return replace(row, prompt=(asked,), chosen=chosen, rejected=rejected)


def _prompt(row: RawPrompt, tokenizer: PreTrainedTokenizerBase) -> tuple[str, Ids]:
    if not isinstance(row.prompt, str):
        text = _render(row.prompt, tokenizer, row.where, answer_next=True)
        return text, _encode(text, tokenizer)
    bare = _encode(row.prompt, tokenizer)
    ids = _encode(row.prompt, tokenizer, special=True)
    # some tokenizers close every text; a prompt goes on
    if bare and len(ids) > len(bare) and ids[-1] == tokenizer.eos_token_id != bare[-1]:
        ids = ids[:-1]
    return row.prompt, ids


def _answer(
    row: RawPair,
    prompt: str,
    ids: Ids,
    answer: Content,
    tokenizer: PreTrainedTokenizerBase,
    whole_turns: bool,
) -> _Answer:
    if tokenizer.eos_token_id is None:
        raise InputError(
            "the tokenizer has no end-of-sequence token, so completions could not end;"
            " set eos_token in tokenizer_config.json"
        )
    if isinstance(answer, str) or isinstance(row.prompt, str):
        text = str(answer)
        return _Answer(text, _ended(_encode(text, tokenizer), tokenizer))
    whole = _render((*row.prompt, *answer), tokenizer, row.where)
    if not whole.startswith(prompt):
        raise InputError(
            f"{row.where}: the chat template writes the prompt differently once it is answered, so"
            " the completion cannot be told from it; give a chat_template without such a step"
            " (often one that adds or removes reasoning)"
        )
    text = whole[len(prompt) :]
    if not whole_turns:
        text = _without_end(text, str(tokenizer.eos_token))
    together = _encode(prompt + text, tokenizer)
    # tokens can span the border; the prompt's own are what a completion is sampled behind
    fits = together[: len(ids)] == ids
    own = together[len(ids) :] if fits else _encode(text, tokenizer)
    return _Answer(text, own if whole_turns else _ended(own, tokenizer))


def _render(
    messages: Sequence[Message],
    tokenizer: PreTrainedTokenizerBase,
    where: str,
    *,
    answer_next: bool = False,
) -> str:
    if not tokenizer.chat_template:
        raise InputError(
            f"{where} is a conversation, but the tokenizer has no chat template;"
            " give one with chat_template, or use plain texts"
        )
    try:
        text = tokenizer.apply_chat_template(
            [dict(message) for message in messages],
            tokenize=False,
            add_generation_prompt=answer_next,
        )
    except TemplateError as error:
        raise InputError(
            f"{where}: the chat template refuses the conversation ({error}); change the row, or"
            " give another chat_template"
        ) from error
    return str(text)


def _without_end(text: str, end: str) -> str:
    # templates close a turn with the end token and a newline, a model stops at the token
    head, found, tail = text.rpartition(end)
    return head if found and not tail.strip() else text


def _ended(ids: Ids, tokenizer: PreTrainedTokenizerBase) -> Ids:
    end = int(tokenizer.eos_token_id)
    while ids and ids[-1] == end:
        ids = ids[:-1]
    return (*ids, end)


def _encode(text: str, tokenizer: PreTrainedTokenizerBase, *, special: bool = False) -> Ids:
    # verbose off: lengths above the model's are cut here, by the budgets
    return tuple(tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])


def _keep_end(ids: Ids, length: int) -> Ids:
    return ids[max(len(ids) - length, 0) :]
