"""Plain files of rows, read piece by piece: JSON Lines, JSON, CSV, Parquet."""

from __future__ import annotations

import csv
import gzip
import json
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from tpmm_pl.data.rows.messages import WAY_OUT, Cell, kind
from tpmm_pl.types import InputError

Read = tuple[str, dict[str, Any] | InputError]
"""File and line, and the row that stands there, or why it cannot be read."""

_BOM = b"\xef\xbb\xbf"
_BATCH_ROWS = 256


def read_file(path: Path) -> Iterator[Read]:
    """Read the rows of a file in its order, in constant memory (a JSON list: in one piece).

    A cell of a CSV file is a :class:`~tpmm_pl.data.rows.messages.Cell`, ``None`` where it is empty.

    Args:
        path: A file whose name ends as :data:`READERS` says.

    Yields:
        Where a row stands, and the row; or the error, where this row alone cannot be read.

    Raises:
        InputError: If the file is missing, of another kind, or cannot be read on.
    """
    if not path.is_file():
        raise InputError(f"no file {path}; check the path")
    suffix = suffix_of(path)
    if suffix is None:
        raise InputError(
            f"{path} is of no known kind; give {', '.join(READERS)}, a folder that datasets saved"
            " (save_to_disk), or the name of a data set on the Hugging Face hub"
        )
    try:
        for where, row in READERS[suffix](path):
            yield where, row if isinstance(row, dict | InputError) else _no_object(row, where)
    except (OSError, EOFError, zlib.error, pa.ArrowException, UnicodeDecodeError) as error:
        raise InputError(
            f"{path} cannot be read ({_first_line(error)}); it may be cut off: save it again"
        ) from error


def suffix_of(path: Path) -> str | None:
    """Return how the name of a file of a known kind ends."""
    return next((suffix for suffix in READERS if path.name.endswith(suffix)), None)


def _read_jsonl(path: Path) -> Iterator[tuple[str, Any]]:
    with path.open("rb") as opened:
        yield from _json_lines(opened, path)


def _read_jsonl_gz(path: Path) -> Iterator[tuple[str, Any]]:
    with gzip.open(path, "rb") as opened:
        yield from _json_lines(opened, path)


def _read_json(path: Path) -> Iterator[tuple[str, Any]]:
    with path.open("rb") as opened:
        if not _starts_with_list(opened):
            yield from _json_lines(opened, path)
            return
        items = _parsed(opened.read(), f"{path}")
    if isinstance(items, InputError):
        raise items
    yield from ((f"{path}, item {number}", item) for number, item in enumerate(items, 1))


def _starts_with_list(opened: IO[bytes]) -> bool:
    text = b""
    while not text and (block := opened.read(4096)):
        text = block.removeprefix(_BOM).lstrip()
    opened.seek(0)
    return text.startswith(b"[")


def _json_lines(lines: Iterable[bytes], path: Path) -> Iterator[tuple[str, Any]]:
    # bytes are cut at "\n" alone: other separators are legal inside JSON strings
    for number, line in enumerate(lines, 1):
        if line.strip():
            where = f"{path}, line {number}"
            yield where, _parsed(line, where)


def _parsed(content: bytes, where: str) -> Any:
    try:
        return json.loads(content.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        return _not_utf8(where, error)
    except json.JSONDecodeError as error:
        line = "" if ", line " in where else f", line {error.lineno}"
        return InputError(
            f"{where}{line}: not JSON ({error.msg} at column {error.colno}); one object a line, or"
            " one list in a .json file"
        )
    except (ValueError, RecursionError) as error:
        return InputError(f"{where}: not JSON that can be read ({error}); delete the row")


def _read_csv(path: Path) -> Iterator[Read]:
    # surrogateescape: a line with undecodable bytes is told from the others
    with path.open("r", encoding="utf-8-sig", errors="surrogateescape", newline="") as opened:
        yield from _csv_rows(opened, path)


def _csv_rows(opened: IO[str], path: Path) -> Iterator[Read]:
    reader = csv.reader(opened, strict=True)
    header: list[str] | None = None
    while True:
        where = f"{path}, line {reader.line_num + 1}"
        try:
            cells = next(reader)
            "".join(cells).encode()
        except StopIteration:
            return
        except csv.Error as error:
            yield where, InputError(f"{where}: not CSV ({error}); quote the cell, or save it again")
            continue
        except UnicodeEncodeError as error:
            yield where, _not_utf8(where, error)
            continue
        if header is None:
            header = _header(cells, where)
        elif cells:
            yield where, _csv_row(header, cells, where)


def _header(cells: list[str], where: str) -> list[str]:
    if len(set(cells)) < len(cells) or not all(cell.strip() for cell in cells):
        raise InputError(f"{where}: the header is {cells}; give each column a name of its own")
    return cells


def _csv_row(header: list[str], cells: list[str], where: str) -> dict[str, Any] | InputError:
    if len(cells) != len(header):
        return InputError(
            f"{where}: {len(cells)} cells, but the header has {len(header)}; quote cells that hold"
            " commas or line ends"
        )
    return {name: Cell(cell) if cell else None for name, cell in zip(header, cells, strict=True)}


def _read_parquet(path: Path) -> Iterator[Read]:
    number = 0
    # ParquetFile, not read_table: that one would read "round=1/" in a path as a column
    with pq.ParquetFile(path) as opened:
        for batch in opened.iter_batches(batch_size=_BATCH_ROWS):
            for row in _batch_rows(batch):
                number += 1
                where = f"{path}, row {number}"
                yield where, _not_utf8(where, row) if isinstance(row, ValueError) else row


def _batch_rows(batch: pa.RecordBatch) -> Iterator[dict[str, Any] | ValueError]:
    try:
        yield from batch.to_pylist()
    except UnicodeDecodeError:
        # row by row, so that the sound ones are kept
        for index in range(batch.num_rows):
            try:
                yield from batch.slice(index, 1).to_pylist()
            except UnicodeDecodeError as error:
                yield error


READERS: dict[str, Callable[[Path], Iterator[tuple[str, Any]]]] = {
    ".jsonl": _read_jsonl,
    ".jsonl.gz": _read_jsonl_gz,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}
"""How the name of a file ends, and what reads it."""


def _no_object(row: Any, where: str) -> InputError:
    return InputError(f"{where}: {kind(row)} where an object belongs; {WAY_OUT}")


def _not_utf8(where: str, error: ValueError) -> InputError:
    return InputError(f"{where}: cannot be read ({_first_line(error)}); save it as UTF-8 text")


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
