"""Tokenised pairs kept between runs: one folder a fingerprint, complete or absent."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pyarrow as pa
from filelock import FileLock
from transformers import PreTrainedTokenizerBase

from tpmm_pl.data.notices import say
from tpmm_pl.data.rows.report import SourceCounts
from tpmm_pl.data.table import MESSAGES, SCHEMA, PairTable
from tpmm_pl.data.tokens.truncation import truncate_prompt
from tpmm_pl.files import file_sha256, replacing_folder
from tpmm_pl.types import InputError

_VERSION = 2
"""Raised when the same rows would become other pairs, so that no stale pair is taken for new."""

CACHE_DIR = Path("runs/.pairs")
"""Where entries are kept unless a config says otherwise, beside the runs that share them."""

CACHED = SCHEMA.append(MESSAGES)
"""Columns of a cached table."""


@dataclass(frozen=True)
class Encoding:
    """How rows become tokens, as :func:`tpmm_pl.data.tokens.chat.tokenize_pairs` takes it.

    Raises:
        InputError: If there is no such truncation, or a budget is too small for any pair.
    """

    max_length: int
    max_prompt_length: int
    truncation: str = "keep_end"
    whole_turns: bool = False

    @classmethod
    def of(
        cls,
        max_length: int,
        max_prompt_length: int | None,
        truncation: str = "keep_end",
        *,
        whole_turns: bool = False,
    ) -> Encoding:
        """Return an encoding whose prompts have half of the length unless a budget is given."""
        budget = max_length // 2 if max_prompt_length is None else max_prompt_length
        return cls(max_length, budget, truncation, whole_turns)

    def __post_init__(self) -> None:
        """Check the budgets before a row is read."""
        if self.max_length < 2:
            raise InputError(f"max_length is {self.max_length}; it must be at least 2 tokens")
        truncate_prompt((), self.max_prompt_length, self.truncation)


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the SHA-256 of all that shapes a tokenizer's tokens, its template included.

    Vocabulary, merges, normaliser, post-processor, added and special tokens count; the path it
    was loaded from and the padding and truncation of its last call do not.
    """
    content = {
        "class": type(tokenizer).__name__,
        "state": _state(tokenizer),
        "special": tokenizer.special_tokens_map,
        "template": tokenizer.chat_template,
    }
    return _hash(content)


def cache_key(source: str, tokenizer: str, encoding: Encoding) -> str:
    """Return the name of the entry that holds a source's pairs.

    Args:
        source: Fingerprint of the source.
        tokenizer: Fingerprint of the tokenizer.
        encoding: Lengths and where to cut. Label noise and splits are no part of it: they are
            applied to the cached pairs.
    """
    content = {"version": _VERSION, "source": source, "tokenizer": tokenizer, **asdict(encoding)}
    return _hash(content)[:32]


def cached(folder: Path, make: Callable[[Path], SourceCounts]) -> tuple[PairTable, SourceCounts]:
    """Return the pairs of an entry and what became of their rows; make it unless it is there.

    Two runs at once make it once. An entry that was damaged is made again.

    Args:
        folder: The entry.
        make: Writes the pairs to a file, as :func:`write_tables` does.

    Raises:
        InputError: If there can be no such folder; and what ``make`` raises.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"pairs cannot be kept in {folder.parent} ({error.strerror}); choose another"
            " data.cache_dir"
        ) from error
    with FileLock(folder.with_name(f"{folder.name}.lock")):
        if folder.exists():
            try:
                return _opened(folder)
            except (pa.ArrowException, OSError, ValueError, LookupError, TypeError) as error:
                say(f"the cached pairs in {folder} are damaged ({error}); they are made again")
        with replacing_folder(folder) as beside:
            counts = make(beside / "pairs.arrow")
            entry = {"sha256": file_sha256(beside / "pairs.arrow"), "counts": vars(counts)}
            (beside / "entry.json").write_text(json.dumps(entry), encoding="utf-8")
        return _opened(folder)


def write_tables(path: Path, tables: Iterable[PairTable]) -> None:
    """Write tables of pairs one after the other as one IPC file with the columns ``CACHED``."""
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, CACHED) as writer:
        for table in tables:
            writer.write_table(table.arrow())


def read_table(path: Path) -> PairTable:
    """Return the pairs of an IPC file; texts and tokens stay on disk until they are asked for."""
    return PairTable.of(pa.ipc.open_file(pa.memory_map(str(path))).read_all())


def _opened(folder: Path) -> tuple[PairTable, SourceCounts]:
    entry = json.loads((folder / "entry.json").read_text(encoding="utf-8"))
    path = folder / "pairs.arrow"
    if file_sha256(path) != entry["sha256"]:
        raise ValueError(f"{path.name} is not what was written")
    known = entry["counts"]
    dropped, cut = Counter(known["dropped"]), Counter(known["cut"])
    return read_table(path), SourceCounts(known["read"], dropped, cut, known["bad"])


def _state(tokenizer: PreTrainedTokenizerBase) -> Any:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        state = json.loads(backend.to_str())
        return {**state, "padding": None, "truncation": None}
    with TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        return {path.name: file_sha256(path) for path in sorted(Path(folder).iterdir())}


def _hash(content: Any) -> str:
    text = json.dumps(content, sort_keys=True, default=str, separators=(",", ":"))
    return sha256(text.encode()).hexdigest()
