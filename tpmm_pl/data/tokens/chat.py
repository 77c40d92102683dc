"""Raw rows to tokens: chat templates, end-of-sequence tokens, length budgets."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from hashlib import sha256
from itertools import compress
from math import isnan, nan
from operator import not_
from typing import TypeVar

from transformers import PreTrainedTokenizerBase

from tpmm_pl.data.rows.formats import RawPair, RawPrompt
from tpmm_pl.data.table import PairTable, as_table
from tpmm_pl.data.tokens.encoding import (
    encode,
    encode_all,
    encode_pairs,
    encode_plain_prompts,
    ended,
    unended,
)
from tpmm_pl.data.tokens.templates import PairTexts, all_pair_texts, prompt_text, render
from tpmm_pl.data.tokens.truncation import Ids, PairIds, truncate_pair, truncate_prompt, unusable
from tpmm_pl.types import Completion, InputError, Pair, Prompt

Row = TypeVar("Row", bound=RawPrompt)

# a token's encoding takes some hundred bytes until its id is taken out of it
_ROWS_A_CALL = 512


def prompt_id(text: str, begin: str | None = None) -> str:
    """Return the name of a prompt: 16 hexadecimal digits of the SHA-256 of its text.

    White space counts as one blank, and none at the ends: prompts that differ in nothing else
    would be the same question on both sides of a split.

    Args:
        text: As the model sees it.
        begin: The beginning-of-sequence token, which does not count: token ids bring it, texts
            do not.
    """
    words = text.removeprefix(begin or "").split()
    return sha256(" ".join(words).encode()).hexdigest()[:16]


def tokenize_pairs(
    rows: Sequence[RawPair],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    max_prompt_length: int | None = None,
    truncation: str = "keep_end",
    whole_turns: bool = False,
) -> tuple[PairTable, Counter[str]]:
    """Apply template and tokenizer; ``prompt_ids + chosen_ids`` is what the model sees.

    Completions end in the end-of-sequence token exactly once, unless they are cut off; tokens
    that a row brings are taken as they are. A prompt over its budget keeps one of its ends, a
    completion its start; the texts stay whole. Reference log-probabilities of a row that was cut
    are left out.

    Args:
        rows: Plain, conversational or tokenised pairs.
        tokenizer: The policy's; with a chat template for conversations.
        max_length: Tokens of prompt and completion together.
        max_prompt_length: Tokens of the prompt; ``None``: up to ``max_length``.
        truncation: Which part of a prompt over its budget stays: ``keep_end`` or ``keep_start``.
        whole_turns: As :func:`judged_ids` reads: plain texts are turns where there is a template,
            and what it writes behind an answer, often a newline, is kept. The conversations behind
            prompts are not: a judge applies a template of its own to them, rewards are learned
            without one.

    Returns:
        The pairs that are left, and counts of the rows that were cut or dropped, by reason.

    Raises:
        InputError: If the tokenizer has no end-of-sequence token or no template, or the template
            does not show a prompt as the beginning of its conversation; if a row's token is not in
            the vocabulary; or if there is no such truncation.
    """
    pairs, turns, counts = [], dict[str, str](), Counter[str]()
    for row, texts, whole in _tokenized(rows, tokenizer, whole_turns):
        if not (whole_turns or isinstance(row.prompt, str)):
            turns[texts.prompt] = json.dumps(row.prompt, ensure_ascii=False)
        ids = truncate_pair(whole, max_length, max_prompt_length, truncation)
        if reason := unusable(ids, whole):
            counts[f"dropped: {reason}"] += 1
            continue
        cut = ids != whole
        counts["prompts cut off"] += ids.prompt != whole.prompt
        counts["completions cut off"] += ids[1:] != whole[1:]
        counts["reference log-probabilities left out"] += cut and _is_scored(row)
        name = prompt_id(texts.prompt, tokenizer.bos_token)
        pairs.append(_pair(row, name, texts, ids, scored=not cut))
    return as_table(pairs, turns), +counts


def tokenize_prompts(
    rows: Sequence[RawPrompt],
    tokenizer: PreTrainedTokenizerBase,
    max_prompt_length: int,
    truncation: str = "keep_end",
) -> list[Prompt]:
    """Apply template and tokenizer to prompts.

    Args:
        rows: Plain or conversational prompts.
        tokenizer: The policy's; with a chat template for conversations.
        max_prompt_length: Tokens of a prompt.
        truncation: Which part of a prompt over its budget stays: ``keep_end`` or ``keep_start``.

    Raises:
        InputError: If the tokenizer has no template for a conversation, or makes no token of a
            prompt; or if there is no such truncation.
    """
    prompts = []
    for block in _blocks(rows):
        texts = [prompt_text(row, tokenizer) for row in block]
        plain = [isinstance(row.prompt, str) for row in block]
        own = encode_plain_prompts(compress(texts, plain), tokenizer)
        written = encode_all(compress(texts, map(not_, plain)), tokenizer)
        for row, text, is_plain in zip(block, texts, plain, strict=True):
            whole = own[text] if is_plain else written[text]
            if not whole:
                raise InputError(
                    f"{row.where}: the tokenizer makes no token of the prompt; delete it"
                )
            ids = truncate_prompt(whole, max_prompt_length, truncation)
            messages = None if isinstance(row.prompt, str) else row.prompt
            name = prompt_id(text, tokenizer.bos_token)
            prompts.append(Prompt(name, text, ids, messages))
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
        return encode(render((*messages, answer), tokenizer, prompt.prompt_id), tokenizer)
    ids = encode_plain_prompts([prompt.text], tokenizer)[prompt.text]
    own = encode(completion.text, tokenizer)
    ends = completion.finished and tokenizer.eos_token_id is not None
    return (*ids, *(ended(own, tokenizer.eos_token_id) if ends else own))


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, embedding_rows: int) -> None:
    """Refuse a tokenizer that knows tokens beyond the model's embedding.

    Args:
        tokenizer: The policy's.
        embedding_rows: How many tokens the model has embeddings of; more than there are tokens
            is usual.

    Raises:
        InputError: If the tokenizer's highest token has no row.
    """
    size = _vocabulary_size(tokenizer)
    if size > embedding_rows:
        raise InputError(
            f"the tokenizer has {size} tokens, the model's embedding only {embedding_rows} rows;"
            " give the tokenizer that belongs to the model, or enlarge the embedding with"
            f" model.resize_token_embeddings({size}) and save the model"
        )


def _tokenized(
    rows: Sequence[RawPair], tokenizer: PreTrainedTokenizerBase, whole_turns: bool
) -> Iterator[tuple[RawPair, PairTexts, PairIds]]:
    size = _vocabulary_size(tokenizer)
    for block in _blocks(rows):
        made = _made_texts([row for row in block if row.ids is None], tokenizer, whole_turns)
        encoded = encode_pairs(made, tokenizer, whole_turns=whole_turns)
        texts = iter(made)
        for row in block:
            if row.ids is None:
                text = next(texts)
                yield row, text, encoded[text]
            else:
                ids = PairIds(*row.ids)
                yield row, _given_texts(ids, row.where, tokenizer, size), ids


def _made_texts(
    rows: Sequence[RawPair], tokenizer: PreTrainedTokenizerBase, whole_turns: bool
) -> list[PairTexts]:
    if rows and tokenizer.eos_token_id is None:
        raise InputError(
            "the tokenizer has no end-of-sequence token, so completions could not end;"
            " set eos_token in tokenizer_config.json"
        )
    return all_pair_texts(rows, tokenizer, whole_turns=whole_turns)


def _given_texts(
    ids: PairIds, where: str, tokenizer: PreTrainedTokenizerBase, size: int
) -> PairTexts:
    for name, tokens in zip(ids._fields, ids, strict=True):
        for token in tokens:
            if not 0 <= token < size:
                raise InputError(
                    f"{where}: {name}_ids has the token {token}, the tokenizer's vocabulary {size}"
                    " tokens; give the tokenizer that made the ids, or texts instead of ids"
                )
    end = tokenizer.eos_token_id
    prompt, chosen, rejected = (
        str(tokenizer.decode(list(one), clean_up_tokenization_spaces=False))
        for one in (ids.prompt, unended(ids.chosen, end), unended(ids.rejected, end))
    )
    return PairTexts(prompt, chosen, rejected)


def _pair(row: RawPair, name: str, texts: PairTexts, ids: PairIds, *, scored: bool) -> Pair:
    return Pair(
        prompt_id=name,
        prompt=texts.prompt,
        chosen=texts.chosen,
        rejected=texts.rejected,
        prompt_ids=ids.prompt,
        chosen_ids=ids.chosen,
        rejected_ids=ids.rejected,
        score_chosen=row.score_chosen,
        score_rejected=row.score_rejected,
        weight=row.weight,
        ref_chosen_logps=row.ref_chosen_logps if scored else nan,
        ref_rejected_logps=row.ref_rejected_logps if scored else nan,
        margin=row.margin,
    )


def _is_scored(row: RawPair) -> bool:
    return not (isnan(row.ref_chosen_logps) and isnan(row.ref_rejected_logps))


def _vocabulary_size(tokenizer: PreTrainedTokenizerBase) -> int:
    # added tokens can leave gaps, so there may be ids above the number of tokens
    return max(len(tokenizer), 1 + max(tokenizer.added_tokens_decoder, default=-1))


def _blocks(rows: Sequence[Row]) -> Iterator[Sequence[Row]]:
    for start in range(0, len(rows), _ROWS_A_CALL):
        yield rows[start : start + _ROWS_A_CALL]
