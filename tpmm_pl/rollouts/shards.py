"""Judged completions of a part of a round's prompts: what a job of its own leaves on disk."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from tpmm_pl.files import replacing
from tpmm_pl.types import Completion, InputError, Prompt

Judged = tuple[Completion, float]
Facts = Mapping[str, str | int | float]

_SCHEMA = pa.schema(
    [
        ("place", pa.int64()),  # of the prompt among the round's
        ("index", pa.int64()),
        ("ids", pa.list_(pa.int32())),
        ("text", pa.string()),
        ("finished", pa.bool_()),
        ("logps", pa.float64()),
        ("score", pa.float64()),
    ]
)
_FACTS = b"tpmm_pl"
_FOLDER = "shards"


@dataclass(frozen=True)
class Shard:
    """Which part of a round's prompts: the ``number``-th of ``count``, from 1."""

    number: int
    count: int

    @classmethod
    def parse(cls, text: str) -> Shard:
        """Read what is written as ``2/8``.

        Raises:
            InputError: If it is written otherwise.
        """
        found = re.fullmatch(r"(\d+)/(\d+)", text)
        if found is None or not 1 <= int(found[1]) <= int(found[2]):
            raise InputError(f"--shard is {text}; write the second of eight parts as 2/8")
        return cls(int(found[1]), int(found[2]))

    def path(self, folder: Path) -> Path:
        """Return where a shard is, below the folder of the record it is made after."""
        return folder / _FOLDER / f"pairs_{self.number}_of_{self.count}.parquet"

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"


def write_shard(path: Path, places: Sequence[int], judged: Sequence[Judged], facts: Facts) -> None:
    """Write a shard, atomically; every value survives bit for bit.

    Args:
        path: The file to make or replace.
        places: Of the shard's prompts among the round's.
        judged: As many for each prompt, all of a prompt together.
        facts: What the completions depend on; they are compared when the shard is read.
    """
    samples = len(judged) // len(places) if places else 0
    rows = [
        (places[n // samples], one.index, list(one.ids), one.text, one.finished, one.logps, score)
        for n, (one, score) in enumerate(judged)
    ]
    columns = list(zip(*rows, strict=True)) or [()] * len(_SCHEMA)
    arrays = [pa.array(values, kind.type) for values, kind in zip(columns, _SCHEMA, strict=True)]
    schema = _SCHEMA.with_metadata({_FACTS: json.dumps(dict(facts))})
    with replacing(path) as beside:
        table = pa.Table.from_arrays(arrays, schema=schema)
        pq.write_table(table, beside, write_page_checksum=True)


def read_shards(
    folder: Path, prompts: Sequence[Prompt], samples: int, facts: Facts
) -> dict[int, list[Judged]]:
    """Read all shards of a record.

    Args:
        folder: Of the record.
        prompts: The round's.
        samples: Completions a prompt.
        facts: What the completions of this run depend on.

    Returns:
        The judged completions of each prompt that a shard has, by its place.

    Raises:
        InputError: If a file cannot be read, or was made of something else.
    """
    found: dict[int, list[Judged]] = {}
    for path in sorted((folder / _FOLDER).glob("pairs_*_of_*.parquet")):
        for row in _read(path, facts).to_pylist():
            place, score = row.pop("place"), row.pop("score")
            one = Completion(prompts[place], **{**row, "ids": tuple(row["ids"])})
            if one.index == 0:
                found[place] = []
            found[place].append((one, score))
    if any(len(judged) != samples for judged in found.values()):
        raise InputError(f"shards in {folder / _FOLDER} are not whole; delete the folder")
    return found


def _read(path: Path, facts: Facts) -> Any:
    try:
        table = pq.ParquetFile(path, page_checksum_verification=True).read()
        written = json.loads(table.schema.metadata[_FACTS])
        table = table.cast(_SCHEMA)
    except (pa.ArrowException, OSError, ValueError, LookupError, TypeError) as error:
        reason = str(error).partition("\n")[0]
        raise InputError(
            f"{path} cannot be read ({reason}); delete it and make it again"
        ) from error
    if changed := [name for name in facts if written.get(name) != facts[name]]:
        name = changed[0]
        raise InputError(
            f"{path} was made with {name} {written.get(name)}, and this run has {facts[name]};"
            " delete it and make it again"
        )
    return table


def fingerprint(value: object) -> str:
    """Hash prompts or settings; objects count by their class and their plain public attributes.

    Where something runs (``device``, ``token_budget``) makes no other completions of it.
    """
    return sha256(json.dumps(_plain(value), sort_keys=True).encode()).hexdigest()[:16]


def _plain(value: object) -> object:
    if value is None or isinstance(value, str | int | float):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, Sequence):
        return [_plain(one) for one in value]
    names = [n for n in getattr(value, "__dict__", {}) if not n.startswith("_")]
    kept = {n: _plain(getattr(value, n)) for n in names if n not in ("device", "token_budget")}
    return {"class": type(value).__qualname__, **kept}
