"""Texts to tokens: many texts in one call, and where the tokens of a completion begin."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from tpmm_pl.data.tokens.templates import PairTexts
from tpmm_pl.data.tokens.truncation import Ids, PairIds


def encode_all(
    texts: Iterable[str], tokenizer: PreTrainedTokenizerBase, *, special: bool = False
) -> dict[str, Ids]:
    """Return the tokens of every text; equal texts are encoded once.

    One call for all of them: fast tokenizers share a list among the processor's cores.

    Args:
        texts: What to encode.
        tokenizer: What encodes.
        special: Whether the tokenizer may add its own tokens at the beginning and the end.
    """
    unique = list(dict.fromkeys(texts))
    if not unique:
        return {}
    encoded = tokenizer(
        unique,
        add_special_tokens=special,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,  # lengths above the model's are cut later, by the budgets
    )
    return dict(zip(unique, map(tuple, encoded["input_ids"]), strict=True))


def encode(text: str, tokenizer: PreTrainedTokenizerBase) -> Ids:
    """Return the tokens of one text, without any that the tokenizer would add."""
    return encode_all([text], tokenizer)[text]


def encode_plain_prompts(
    texts: Iterable[str], tokenizer: PreTrainedTokenizerBase
) -> dict[str, Ids]:
    """Return the tokens of prompts that no template has written.

    The tokenizer's own beginning comes once, also where the text writes it; what it adds at the
    end does not come, for a prompt goes on. A text without tokens of its own has none.
    """
    texts = list(texts)
    bare = encode_all(texts, tokenizer)
    added = encode_all(texts, tokenizer, special=True)
    return {text: _begun(bare[text], added[text]) for text in texts}


def encode_continuations(
    given: Sequence[tuple[str, str]], prompts: Mapping[str, Ids], tokenizer: PreTrainedTokenizerBase
) -> dict[tuple[str, str], Ids]:
    """Return the tokens of texts behind their prompts.

    They are those of prompt and text as one, without the prompt's own. Where tokens span the
    border, the text is encoded alone: a completion is sampled behind the prompt's own tokens.

    Args:
        given: Prompts, each with a text that follows it.
        prompts: The tokens of all those prompts.
        tokenizer: What encodes.
    """
    tails = _tails(prompts, tokenizer)
    together = encode_all((tails[prompt].text + text for prompt, text in given), tokenizer)
    own = {
        (prompt, text): _behind(tails[prompt].ids, together[tails[prompt].text + text])
        for prompt, text in given
    }
    alone = encode_all((text for (_, text), ids in own.items() if ids is None), tokenizer)
    return {key: alone[key[1]] if ids is None else ids for key, ids in own.items()}


def encode_pairs(
    texts: Sequence[PairTexts], tokenizer: PreTrainedTokenizerBase, *, whole_turns: bool = False
) -> dict[PairTexts, PairIds]:
    """Return the tokens of pairs, each completion ended by the end-of-sequence token once.

    Args:
        texts: What templates wrote, and plain texts.
        tokenizer: What encodes; it has an end-of-sequence token.
        whole_turns: Whether completions end as the template writes them instead.
    """
    plain = [text for text in texts if not text.templated]
    written = [text for text in texts if text.templated]
    return _plain(plain, tokenizer) | _written(written, tokenizer, whole_turns)


def ended(ids: Ids, end: int) -> Ids:
    """Return tokens with ``end`` behind them, once."""
    return (*unended(ids, end), end)


def unended(ids: Ids, end: int | None) -> Ids:
    """Return tokens without any ``end`` behind them."""
    while ids and ids[-1] == end:
        ids = ids[:-1]
    return ids


def _plain(
    texts: Sequence[PairTexts], tokenizer: PreTrainedTokenizerBase
) -> dict[PairTexts, PairIds]:
    prompts = encode_plain_prompts((text.prompt for text in texts), tokenizer)
    answers = encode_all((one for text in texts for one in text.answers), tokenizer)
    end = tokenizer.eos_token_id
    return {
        text: PairIds(prompts[text.prompt], *(ended(answers[one], end) for one in text.answers))
        for text in texts
    }


def _written(
    texts: Sequence[PairTexts], tokenizer: PreTrainedTokenizerBase, whole_turns: bool
) -> dict[PairTexts, PairIds]:
    prompts = encode_all((text.prompt for text in texts), tokenizer)
    given = [(text.prompt, one) for text in texts for one in text.answers]
    answers = encode_continuations(given, prompts, tokenizer)
    if not whole_turns:
        end = tokenizer.eos_token_id
        answers = {key: ended(ids, end) for key, ids in answers.items()}
    return {
        text: PairIds(prompts[text.prompt], *(answers[text.prompt, one] for one in text.answers))
        for text in texts
    }


class _Tail(NamedTuple):
    text: str
    ids: Ids


def _tails(prompts: Mapping[str, Ids], tokenizer: PreTrainedTokenizerBase) -> dict[str, _Tail]:
    """Return the end of each prompt that is enough to see how the text behind it is cut.

    Texts are split at control tokens first, so what stands before the last one changes nothing
    behind it: a long prompt is encoded once, not once more for every completion.
    """
    controls = _controls(next(iter(prompts), ""), tokenizer)
    starts = {text: max((text.rfind(one) for one in controls), default=0) for text in prompts}
    tails = {text: text[max(start, 0) :] for text, start in starts.items()}
    ids = encode_all(tails.values(), tokenizer)
    return {
        text: _Tail(tail, ids[tail]) if _ends_in(prompts[text], ids[tail]) else _Tail(text, whole)
        for (text, tail), whole in zip(tails.items(), prompts.values(), strict=True)
    }


def _controls(text: str, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    # one prompt's are enough to look for: a prompt that has none of them is encoded whole
    added = (token.content for token in tokenizer.added_tokens_decoder.values())
    return [content for content in added if content in text]


def _ends_in(ids: Ids, tail: Ids) -> bool:
    return bool(tail) and ids[-len(tail) :] == tail


def _behind(ids: Ids, together: Ids) -> Ids | None:
    return together[len(ids) :] if together[: len(ids)] == ids else None


def _begun(bare: Ids, added: Ids) -> Ids:
    if not bare:
        return ()
    starts = range(len(added) - len(bare) + 1)
    start = next((at for at in starts if added[at : at + len(bare)] == bare), 0)
    begin = added[:start]
    return bare if bare[:start] == begin else begin + bare
