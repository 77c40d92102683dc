"""One pair as a person reads it: what the model is shown, and what it is trained on."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

from tpmm_pl.data.packing import pack_rows, pair_rows
from tpmm_pl.types import Pair

_SHOWN = 600
"""Characters of a part that are shown."""


def describe_example(pair: Pair, tokenizer: PreTrainedTokenizerBase) -> str:
    r"""Decode a pair's tokens, those that carry the loss in brackets.

    Which ones do is read from a batch of this pair. Special tokens are shown, line
    breaks as ``\n``, and long texts without their middle.

    Args:
        pair: After truncation.
        tokenizer: The one that made its tokens.

    Returns:
        A line of explanation, then one each for prompt, chosen and rejected completion.
    """
    tree = pack_rows(pair_rows([pair]))
    chosen, rejected = (tree.targets[tree.row_of == row] for row in (0, 1))
    prompt = tree.tokens[: int(tree.states[0]) + 1]
    parts = {
        "prompt": (len(prompt), " " + _readable(prompt.tolist(), tokenizer)),
        "chosen": (len(chosen), f"[{_readable(chosen.tolist(), tokenizer)}]"),
        "rejected": (len(rejected), f"[{_readable(rejected.tolist(), tokenizer)}]"),
    }
    width = max(len(str(count)) for count, _ in parts.values())
    lines = [f"{name:<8}  {count:>{width}} tokens  {text}" for name, (count, text) in parts.items()]
    swapped = ", its label swapped by noise" if pair.flipped else ""
    return "\n".join([f"one example{swapped}; the tokens in brackets are trained on", *lines])


def _readable(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> str:
    text = str(tokenizer.decode(ids, clean_up_tokenization_spaces=False))
    # control characters of the data must not steer the terminal
    return "".join(one if one.isprintable() else _escaped(one) for one in _shortened(text))


def _shortened(text: str) -> str:
    if len(text) <= _SHOWN:
        return text
    half = _SHOWN // 2
    return f"{text[:half]} ... ({len(text) - 2 * half} characters) ... {text[-half:]}"


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")
