"""Pairs on disk: one parquet file a round, complete or absent."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tpmm_pl.data.splits import quoted
from tpmm_pl.data.table import SCHEMA, PairTable, arrow, join
from tpmm_pl.files import file_sha256, replacing
from tpmm_pl.trajectory import TrajectoryStore
from tpmm_pl.types import InputError, Pair

_MAY_LACK = {"margin"}  # files of runs that began before there was one
_BLOCK = 4096
"""Pairs made at a time on writing."""


def write_pairs(path: Path, pairs: Sequence[Pair]) -> str:
    """Write pairs as parquet, atomically; every value survives bit for bit.

    Args:
        path: The file to make or replace.
        pairs: What to write; may be empty.

    Returns:
        The file's SHA-256.
    """
    with replacing(path) as beside, pq.ParquetWriter(beside, SCHEMA) as writer:
        for start in range(0, len(pairs), _BLOCK):
            writer.write_table(arrow(pairs[start : start + _BLOCK]))
    return file_sha256(path)


def read_pairs(path: Path) -> PairTable:
    """Read what :func:`write_pairs` wrote.

    Raises:
        InputError: If the file is missing, is no parquet file, or has other columns.
    """
    return PairTable.of(_read_table(path))


def read_fuse_pool(store: TrajectoryStore, round_index: int) -> PairTable:
    """Return all held-out pairs of a run up to a round.

    Raises:
        InputError: If there are none.
    """
    pairs = _fuse_pairs(store, round_index)
    if not pairs:
        raise InputError(
            f"learned coefficients need held-out pairs, and {store.root} has none; set"
            " data.fuse_fraction above 0, or give data.fuse, or choose another strategy"
        )
    return pairs


def refuse_fuse_prompts(pairs: PairTable, store: TrajectoryStore, round_index: int) -> None:
    """Check that no prompt of a round's pairs is one of the run's held-out pairs.

    Args:
        pairs: To be trained on.
        store: Holds the fuse pairs of all rounds.
        round_index: The round they are made after.

    Raises:
        InputError: If a prompt is on both sides; it is quoted.
    """
    held_out = set(_fuse_pairs(store, round_index).column("prompt_id").tolist())
    shared = [n for n, name in enumerate(pairs.column("prompt_id").tolist()) if name in held_out]
    if shared:
        raise InputError(
            f"{len(shared)} of {len(pairs)} pairs for round {round_index + 1} have prompts of the"
            f" held-out fuse pairs in {store.root}, as {quoted(pairs[shared[0]].prompt)}; resume"
            " with the data and the seed that the run began with, or begin a new run"
        )


def _fuse_pairs(store: TrajectoryStore, round_index: int) -> PairTable:
    records = [r for r in store.rounds if r.round <= round_index and r.fuse]
    return join(*(read_pairs(store.path(str(record.fuse))) for record in records))


def _read_table(path: Path) -> Any:
    if not path.is_file():
        raise InputError(f"no pairs file at {path}; check the path, or make the pairs first")
    try:
        # ParquetFile, not read_table: that one would read "round=1/" in a path as a column
        table = pq.ParquetFile(path).read()
    except (pa.ArrowException, OSError) as error:
        raise InputError(
            f"{path} cannot be read as parquet ({_first_line(error)}); delete it and make it again"
        ) from error
    names = set(table.column_names)
    missing = [name for name in SCHEMA.names if name not in names | _MAY_LACK]
    extra = sorted(names.difference(SCHEMA.names))
    if missing or extra or len(names) != len(table.column_names):
        raise InputError(
            f"{path} is not a file of pairs: columns missing {missing}, unknown {extra};"
            " give preference data as JSONL and let the pairs be made from it"
        )
    try:
        here = [field for field in SCHEMA if field.name in names]
        table = table.select([field.name for field in here]).cast(pa.schema(here))
    except pa.ArrowException as error:
        raise InputError(
            f"{path} is not a file of pairs: {_first_line(error)}; make it again"
        ) from error
    if empty := [name for name in table.column_names if table.column(name).null_count]:
        raise InputError(f"{path} has missing values in {empty}; make it again")
    for name in sorted(_MAY_LACK - names):
        table = table.append_column(SCHEMA.field(name), pa.array(np.zeros(len(table))))
    return table


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0].rstrip(".")
