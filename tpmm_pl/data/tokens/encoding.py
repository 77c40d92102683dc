"""Texts to tokens: many texts in one call, and where the tokens of a completion begin."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import chain

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from tpmm_pl.data.tokens.templates import PairTexts
from tpmm_pl.data.tokens.truncation import Ids, PairIds

_ENCODING = ("__call__", "_encode_plus", "_batch_encode_plus")
"""Methods in which a class of tokenizers may do more to a text than its backend does."""


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
    if (backend := _backend(tokenizer)) is not None:
        # the tokenizer's own call makes offsets and copies besides, half as much work again
        found = [one.ids for one in backend.encode_batch_fast(unique, add_special_tokens=special)]
    else:
        found = tokenizer(
            unique,
            add_special_tokens=special,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,  # lengths above the model's are cut later, by the budgets
        )["input_ids"]
    return dict(zip(unique, map(tuple, found), strict=True))


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


def encode_written(texts: Iterable[str], tokenizer: PreTrainedTokenizerBase) -> dict[str, Ids]:
    """Return the tokens of what a template has written; a turn in many of them is encoded once."""
    texts = list(texts)
    control = _control(texts, tokenizer)
    cut = {text: _pieces(text, control) for text in texts}
    ids = encode_all(chain.from_iterable(cut.values()), tokenizer)
    return {
        text: tuple(chain.from_iterable(ids[one] for one in pieces)) for text, pieces in cut.items()
    }


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
    control = _control(prompts, tokenizer)
    # of a prompt only the end: it is not encoded once more for every completion
    tails = {prompt: _pieces(prompt, control)[-1] for prompt in prompts}
    together = encode_all((tails[prompt] + text for prompt, text in given), tokenizer)
    ids = {**prompts, **encode_all({*tails.values()} - prompts.keys(), tokenizer)}
    own = {
        (prompt, text): _behind(ids[tails[prompt]], together[tails[prompt] + text])
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


def _backend(tokenizer: PreTrainedTokenizerBase) -> Tokenizer | None:
    """Return what encodes for a tokenizer, set as its own call would; ``None`` if it does more."""
    own, common = type(tokenizer), PreTrainedTokenizerFast
    if not isinstance(tokenizer, common):
        return None
    if any(getattr(own, name, None) is not getattr(common, name, None) for name in _ENCODING):
        return None
    backend: Tokenizer = tokenizer.backend_tokenizer
    backend.no_padding()
    backend.no_truncation()
    backend.encode_special_tokens = tokenizer.split_special_tokens
    return backend


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
    prompts = encode_written((text.prompt for text in texts), tokenizer)
    given = [(text.prompt, one) for text in texts for one in text.answers]
    answers = encode_continuations(given, prompts, tokenizer)
    if not whole_turns:
        end = tokenizer.eos_token_id
        answers = {key: ended(ids, end) for key, ids in answers.items()}
    return {
        text: PairIds(prompts[text.prompt], *(answers[text.prompt, one] for one in text.answers))
        for text in texts
    }


def _control(texts: Iterable[str], tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Return a control token before which texts can be cut: their tokens are the pieces' in a row.

    Tokenizers take control tokens out of a text first and encode what is between them by itself.
    Left out are those that reach over their beginning, by taking blanks or looking at a letter in
    front of it, and those whose beginning may be within another one. ``None`` if there is no other.
    """
    # the last one of one prompt is enough: others that lack it are encoded whole
    text = next(iter(texts), "")
    if _backend(tokenizer) is None or tokenizer.split_special_tokens:
        return None
    added = tokenizer.added_tokens_decoder.values()
    if any(token.single_word for token in added):
        return None
    found = [
        token.content
        for token in added
        if token.content in text
        and not (token.normalized or token.lstrip)
        and not any(_holds_beginning(other.content, token.content) for other in added)
    ]
    return max(found, key=text.rfind, default=None)


def _holds_beginning(one: str, of: str) -> bool:
    ends = (one[start:] for start in range(1, len(one)))
    return any(end.startswith(of) or of.startswith(end) for end in ends)


def _pieces(text: str, control: str | None) -> list[str]:
    if control is None:
        return [text]
    first, *others = text.split(control)
    return [first, *(control + one for one in others)]


def _behind(ids: Ids, together: Ids) -> Ids | None:
    return together[len(ids) :] if together[: len(ids)] == ids else None


def _begun(bare: Ids, added: Ids) -> Ids:
    if not bare:
        return ()
    starts = range(len(added) - len(bare) + 1)
    start = next((at for at in starts if added[at : at + len(bare)] == bare), 0)
    begin = added[:start]
    return bare if bare[:start] == begin else begin + bare
