"""Whether two models call their tokens alike."""

from __future__ import annotations

from pathlib import Path

from transformers import AutoTokenizer

from tpmm_pl.files import file_sha256
from tpmm_pl.models.location import loading
from tpmm_pl.types import InputError

TOKENIZER = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt",
    "*.model", "*.tiktoken", "*.jinja",
)  # fmt: skip
"""Files of tokenizers."""


def refuse_other_tokens(first: Path, name: str, other: Path, other_name: str) -> None:
    """Refuse a model whose tokenizer numbers a token otherwise.

    Folders without a tokenizer, as trainers write them between two others, pass.

    Args:
        first: A model's folder.
        name: What the user calls it.
        other: Another model's folder.
        other_name: What the user calls that.

    Raises:
        InputError: Naming the first token that differs.
    """
    files = [folder / "tokenizer.json" for folder in (first, other)]
    if not (has_tokenizer(first) and has_tokenizer(other)):
        return
    if all(file.is_file() for file in files) and len(set(map(file_sha256, files))) == 1:
        return
    ours, theirs = _vocabulary(first, name), _vocabulary(other, other_name)
    if odd := {token for token, _ in ours.items() ^ theirs.items()}:
        token = min(odd, key=lambda token: ours.get(token, theirs.get(token, 0)))
        numbers = [known.get(token, "absent") for known in (theirs, ours)]
        raise InputError(
            f"{other_name} has another vocabulary than {name}: token {token!r} is {numbers[0]}, not"
            f" {numbers[1]} ({len(odd)} tokens differ); give models of one tokenizer"
        )


def has_tokenizer(folder: Path) -> bool:
    """Say whether a tokenizer lies in a model's folder."""
    return any(next(folder.glob(pattern), None) is not None for pattern in TOKENIZER[:1])


def _vocabulary(folder: Path, name: str) -> dict[str, int]:
    load = AutoTokenizer.from_pretrained
    known: dict[str, int] = loading(name, lambda: load(folder).get_vocab())
    return known
