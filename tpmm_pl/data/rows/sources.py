"""Where rows come from: files, folders and data sets on the hub, one after another or mixed."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from itertools import islice
from pathlib import Path

from tpmm_pl.data.rows.hub import HubData, dataset_fingerprint, dataset_rows, is_saved
from tpmm_pl.data.rows.mappings import Located, Refuse, find_mapping, mapping_of
from tpmm_pl.data.rows.mixture import check_weights
from tpmm_pl.data.rows.rankings import PAIRINGS
from tpmm_pl.data.rows.readers import Read, read_file, suffix_of
from tpmm_pl.data.rows.slices import Slice, parse_split
from tpmm_pl.files import file_sha256
from tpmm_pl.registry import lookup
from tpmm_pl.types import InputError

_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


@dataclass(frozen=True)
class DataSource:
    """Rows of preference data or prompts, and how to read them.

    Args:
        path: A ``.jsonl``, ``.jsonl.gz``, ``.json``, ``.csv`` or ``.parquet`` file; a folder that
            ``datasets`` saved (``save_to_disk``); or a data set on the Hugging Face hub.
        split: Which split and rows: ``train``, ``train[:10%]``, ``train[100:200]``; a file has
            rows only: ``[:1000]``.
        name: Configuration of a data set on the hub.
        revision: Branch, tag or commit of a data set on the hub.
        weight: Share of the rows when several sources are mixed, relative to the others; ``None``
            for all sources: they follow one another.
        mapping: A ready mapping by name, or ``{our field: their column}``; by default the one made
            for the data set on the hub, if there is one.
        pairing: Which answers of a ranking make pairs: ``best_worst``, ``adjacent``, ``all`` or
            ``margin`` (all, with the difference of their scores as margin).
        streaming: Do not download a data set on the hub before its rows are read.

    Raises:
        InputError: If a setting is of no known form or name.
    """

    path: str
    split: str | None = None
    name: str | None = None
    revision: str | None = None
    weight: float | None = None
    mapping: str | dict[str, str] | None = None
    pairing: str = "best_worst"
    streaming: bool = False

    def __post_init__(self) -> None:
        lookup("pairing", self.pairing, PAIRINGS)
        find_mapping(self.mapping, None)
        parse_split(self.split)
        check_weights([self.weight])

    @property
    def label(self) -> str:
        """Name of the source in reports."""
        return " ".join(part for part in (self.path, self.name, self.split) if part)

    @property
    def hub_id(self) -> str | None:
        """The data set on the hub, ``None`` for files and folders."""
        path = Path(self.path)
        local = path.exists() or suffix_of(path) or not _HUB_ID.fullmatch(self.path)
        return None if local else self.path


def as_sources(
    value: str | Path | DataSource | Sequence[str | Path | DataSource],
) -> list[DataSource]:
    """Return one source or several as a list.

    Raises:
        InputError: If there is none, or some have weights and others not.
    """
    several = [value] if isinstance(value, str | Path | DataSource) else value
    sources = [one if isinstance(one, DataSource) else DataSource(path=str(one)) for one in several]
    if not sources:
        raise InputError("no source of data is given; give a file, a folder or a data set's name")
    check_weights([source.weight for source in sources])
    return sources


def located_rows(source: DataSource, refuse: Refuse | None = None) -> Iterator[Located]:
    """Read the rows of a source lazily, after its mapping.

    Args:
        source: What to read.
        refuse: Takes note of each row that cannot be read, and the others follow; ``None``: such
            a row is an error.

    Yields:
        File and line of a row, for messages, and the row.

    Raises:
        InputError: If the source cannot be read; or, without ``refuse``, one of its rows.
    """
    take_note = refuse or _raise
    mapped = find_mapping(source.mapping, source.hub_id)
    return mapped(_sound(_read(source), take_note), take_note)


def fingerprint(source: DataSource) -> str:
    """Return a SHA-256, hexadecimal, of everything that makes a source's rows what they are.

    It covers the content of a file or folder, the version of a data set on the hub, and every
    setting that changes rows; not where a file lies, nor the weight in a mixture.

    Raises:
        InputError: If the source is missing or, on the hub, cannot be reached.
    """
    path, data = Path(source.path), _hub_data(source)
    if data is not None:
        content = [dataset_fingerprint(data, part) for part in parse_split(source.split)]
    else:
        content = [file_sha256(_file(path)), str(suffix_of(path))]
    settings = {
        "content": content,
        "split": source.split,
        "mapping": source.mapping or mapping_of(source.hub_id),
        "pairing": source.pairing,
    }
    return sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def _read(source: DataSource) -> Iterator[Read]:
    data, path = _hub_data(source), Path(source.path)
    for part in parse_split(source.split):
        yield from _file_rows(path, part) if data is None else dataset_rows(data, part)


def _hub_data(source: DataSource) -> HubData | None:
    path = Path(source.path)
    if path.is_dir() and not is_saved(path):
        raise InputError(
            f"{path} is a folder, but datasets saved nothing in it; give a file, or a folder that"
            " save_to_disk made"
        )
    if source.hub_id is None and not path.is_dir():
        return None
    return HubData(source.path, source.name, source.revision, source.streaming)


def _file_rows(path: Path, part: Slice) -> Iterator[Read]:
    if part.split not in (None, "train"):
        raise InputError(
            f"{path} is a file, it has no split {part.split!r}; name rows alone, as in [:1000]"
        )
    start, stop = part.bounds(lambda: sum(1 for _ in read_file(path)))
    return islice(read_file(path), start, stop)


def _file(path: Path) -> Path:
    if not path.is_file():
        raise InputError(f"no file {path}; check the path")
    return path


def _sound(rows: Iterator[Read], refuse: Refuse) -> Iterator[Located]:
    for where, row in rows:
        if isinstance(row, InputError):
            refuse(row)
        else:
            yield where, row


def _raise(error: InputError) -> None:
    raise error
