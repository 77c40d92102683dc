"""Sources of preference data become tables of pairs: read, tokenised once, cached."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from itertools import islice, repeat
from pathlib import Path
from typing import TypeVar

import pyarrow as pa
import pyarrow.parquet as pq
from lightning.pytorch.utilities import rank_zero_only
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from tpmm_pl.data.cache import (
    Encoding,
    cache_key,
    cached,
    tokenizer_fingerprint,
    write_tables,
)
from tpmm_pl.data.notices import say
from tpmm_pl.data.rows.formats import RawPair, preferences
from tpmm_pl.data.rows.mixture import mixed
from tpmm_pl.data.rows.report import DataReport, SourceCounts
from tpmm_pl.data.rows.sources import DataSource, fingerprint
from tpmm_pl.data.table import PairTable, join
from tpmm_pl.data.tokens.chat import tokenize_pairs
from tpmm_pl.types import InputError

Row = TypeVar("Row")
Made = TypeVar("Made")

# in this order: a config writes a value by the first type that takes it, and str takes anything
Data = DataSource | list[DataSource | str | Path] | str | Path
"""Files, folders and data sets, as a config names them."""

REPORT = "data_report.json"
"""Name of the report in the folder of a run."""

_QUOTED = 3
"""Skipped rows whose sentences are said; all of them are in the report."""

_CHUNK = 1024
"""Rows tokenised at a time: all of them that is ever in memory as objects."""


class Preparation:
    """Makes tables of pairs from sources and counts what becomes of their rows.

    Args:
        tokenizer: The model's.
        encoding: Lengths, and where to cut.
        max_bad_rows: How many rows that cannot be read may be skipped, over all sources; ``None``:
            none.
        cache_dir: Where tokenised pairs are kept, one folder a fingerprint; ``None``: in memory.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        encoding: Encoding,
        *,
        max_bad_rows: int | None = None,
        cache_dir: Path | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.encoding = encoding
        self.cache_dir = cache_dir
        self.report = DataReport(max_bad_rows)
        self._tokenizer = "" if cache_dir is None else tokenizer_fingerprint(tokenizer)

    def tables(self, sources: Sequence[DataSource]) -> list[PairTable]:
        """Return the pairs of each source; what became of the rows is added to ``report``.

        Raises:
            InputError: If a source is at fault or has too many bad rows.
        """
        refuse_setting(sources, "streaming", "its pairs are all read before training")
        return [self._table(source) for source in sources]

    def held_out(self, sources: Sequence[DataSource]) -> PairTable:
        """Return the pairs of sources that are not trained on, one source after the other.

        Raises:
            InputError: As :meth:`tables`; or if there is no pair.
        """
        refuse_setting(sources, "weight", "held-out pairs are all taken")
        pairs = join(*self.tables(sources))
        if not pairs:
            label = ", ".join(source.label for source in sources)
            raise InputError(f"{label} leaves no held-out pair after truncation; give others")
        return pairs

    def stream(
        self, sources: Sequence[DataSource], report: DataReport, seed: int
    ) -> Iterator[PairTable]:
        """Yield the pairs of sources as they are read, some thousand rows at a time.

        Args:
            sources: Mixed by their weights.
            report: Counts what becomes of the rows.
            seed: Of the mixture.
        """
        rows = [zip(repeat(one.label), preferences(one, report)) for one in sources]
        for chunk in _chunks(mixed(rows, [one.weight for one in sources], seed)):
            parts: dict[str, list[RawPair]] = {}
            for label, row in chunk:
                parts.setdefault(label, []).append(row)
            yield join(*(self._tokenized(some, label, report) for label, some in parts.items()))

    def _table(self, source: DataSource) -> PairTable:
        if self.cache_dir is None:
            report = DataReport(self.report.max_bad_rows)
            table, counts = join(*self._chunks_of(source, report)), _counts(report, source)
        else:
            key = cache_key(fingerprint(source), self._tokenizer, self.encoding)
            table, counts = cached(self.cache_dir / key, partial(self._write, source))
        found = DataReport(self.report.max_bad_rows)
        found.sources[source.label] = counts
        self.report.merge(found)
        return table

    def _write(self, source: DataSource, path: Path) -> SourceCounts:
        report = DataReport(self.report.max_bad_rows)
        write_tables(path, self._chunks_of(source, report))
        return _counts(report, source)

    def _chunks_of(self, source: DataSource, report: DataReport) -> Iterator[PairTable]:
        progress = tqdm(
            total=_expected(source),
            desc=f"tokenising {source.label}",
            unit=" rows",
            disable=None,  # silent where there is no terminal
        )
        with progress:
            for rows in _chunks(preferences(source, report)):
                yield self._tokenized(rows, source.label, report)
                progress.update(len(rows))

    def _tokenized(self, rows: Sequence[RawPair], label: str, report: DataReport) -> PairTable:
        make = partial(self._table_of, label=label, report=report)
        return join(*sound_parts(rows, make, partial(report.bad, source=label)))

    def _table_of(self, rows: Sequence[RawPair], label: str, report: DataReport) -> PairTable:
        pairs, counts = tokenize_pairs(rows, self.tokenizer, **asdict(self.encoding))
        for reason, count in counts.items():
            if reason.startswith("dropped: "):
                report.drop(label, reason.removeprefix("dropped: "), count)
            else:
                report.cut(label, reason, count)
        return pairs


def sound_parts(
    rows: Sequence[Row], make: Callable[[Sequence[Row]], Made], refuse: Callable[[InputError], None]
) -> list[Made]:
    """Make something of all rows at once or, where one is at fault, of each sound one.

    Args:
        rows: What is read.
        make: Raises if a row is at fault.
        refuse: Takes note of a row that is.
    """
    try:
        return [make(rows)]
    except InputError:
        made = []
        for row in rows:
            try:
                made.append(make([row]))
            except InputError as error:
                refuse(error)
        return made


def announce(report: DataReport, folder: Path) -> None:
    """Say what became of the rows, quote the first that were skipped, write the report.

    Args:
        report: Of all sources.
        folder: Of the run.
    """
    if table := report.table():
        say(table)
    skipped = report.bad_rows()
    for sentence in skipped[:_QUOTED]:
        say(f"skipped: {sentence}")
    if len(skipped) > _QUOTED:
        say(f"skipped: {len(skipped) - _QUOTED} more, all of them in {folder / REPORT}")
    write_report(report, folder)


@rank_zero_only
def write_report(report: DataReport, folder: Path) -> None:
    """Write the report into the folder of a run, in one process."""
    report.write(folder / REPORT)


def refuse_setting(sources: Sequence[DataSource], name: str, why: str) -> None:
    """Refuse sources with a setting that would have no effect.

    Raises:
        InputError: Naming the source.
    """
    for source in sources:
        if getattr(source, name):
            raise InputError(f"{source.label} sets {name}, but {why}; leave it out")


def refuse_below(least: int, **settings: int) -> None:
    """Refuse numbers that are too small.

    Raises:
        InputError: Naming the setting.
    """
    for name, value in settings.items():
        if value < least:
            raise InputError(f"{name} is {value}; it must be at least {least}")


def _chunks(rows: Iterable[Row]) -> Iterator[list[Row]]:
    rows = iter(rows)
    while chunk := list(islice(rows, _CHUNK)):
        yield chunk


def _counts(report: DataReport, source: DataSource) -> SourceCounts:
    return report.sources.get(source.label, SourceCounts())


def _expected(source: DataSource) -> int | None:
    """Return the rows of a file where they are counted quickly, for the time left."""
    path = Path(source.path)
    if source.split is not None or not path.is_file():
        return None
    if path.suffix == ".parquet":
        # a file that is cut off is refused where its rows are read
        with suppress(pa.ArrowException):
            return int(pq.read_metadata(path).num_rows)
    if path.suffix != ".jsonl":
        return None
    with path.open("rb") as opened:
        return sum(block.count(b"\n") for block in iter(partial(opened.read, 1 << 20), b""))
