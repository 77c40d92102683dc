"""What became of the data: rows read, dropped, cut and skipped, by source and reason."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tpmm_pl.files import write_text
from tpmm_pl.types import InputError


@dataclass
class SourceCounts:
    """What became of one source's rows: read = kept + dropped + bad."""

    read: int = 0
    """Pairs or prompts the rows stand for: a ranking counts once for every pair it offers."""
    dropped: Counter[str] = field(default_factory=Counter)
    cut: Counter[str] = field(default_factory=Counter)
    """Kept, but shortened."""
    bad: list[str] = field(default_factory=list)
    """One sentence for every row that was skipped because it could not be read."""


class DataReport:
    """Collects what became of the rows, so that none is lost unseen.

    Args:
        max_bad_rows: How many rows, over all sources, may be skipped because they cannot be read;
            ``None``: none, and there is no setting that allows some.

    Raises:
        InputError: If ``max_bad_rows`` is negative.
    """

    def __init__(self, max_bad_rows: int | None = None) -> None:
        if max_bad_rows is not None and max_bad_rows < 0:
            raise InputError(f"max_bad_rows is {max_bad_rows}; give 0 or more rows to skip")
        self.max_bad_rows = max_bad_rows
        self.sources: dict[str, SourceCounts] = {}

    def read(self, source: str, count: int = 1) -> None:
        """Count rows that were read, whatever becomes of them."""
        self._of(source).read += count

    def drop(self, source: str, reason: str, count: int = 1) -> None:
        """Count rows that are sound but cannot be trained on."""
        self._of(source).dropped[reason] += count

    def cut(self, source: str, reason: str, count: int = 1) -> None:
        """Count rows that are kept, but shortened."""
        self._of(source).cut[reason] += count

    def bad(self, error: InputError, source: str) -> None:
        """Count a row that cannot be read and keep the sentence about it.

        Raises:
            InputError: ``error`` with one more way out, once there are more than
                ``max_bad_rows`` such rows.
        """
        if self.max_bad_rows is None:
            raise error
        self._of(source).bad.append(str(error))
        bad = len(self.bad_rows())
        if bad > self.max_bad_rows:
            raise InputError(
                f"{error}; this is bad row {bad}: raise --data.max_bad_rows, now"
                f" {self.max_bad_rows}, to skip and count such rows"
            ) from error

    def dropped(self, source: str) -> Counter[str]:
        """Return how many rows of a source were dropped, by reason."""
        return self._of(source).dropped.copy()

    def merge(self, other: DataReport) -> None:
        """Add the counts of another report, as of another process.

        Raises:
            InputError: If both together have more than ``max_bad_rows`` bad rows.
        """
        for source, counts in other.sources.items():
            own = self._of(source)
            own.read += counts.read
            own.dropped += counts.dropped
            own.cut += counts.cut
            for sentence in counts.bad:
                self.bad(InputError(sentence), source)

    def bad_rows(self) -> list[str]:
        """Return the sentences about all skipped rows."""
        return [sentence for counts in self.sources.values() for sentence in counts.bad]

    def table(self) -> str:
        """Return an aligned table, one line a source and reason; empty without sources."""
        lines = [
            (source, what, str(count))
            for source in self.sources
            for what, count in self._of_all(source)
        ]
        if not lines:
            return ""
        lines = [("source", "what", "rows"), *lines]
        first, second, third = (max(map(len, column)) for column in zip(*lines, strict=True))
        return "\n".join(f"{a:<{first}}  {b:<{second}}  {c:>{third}}" for a, b, c in lines)

    def write(self, path: Path) -> None:
        """Write the counts and the sentences about bad rows as JSON, atomically."""
        write_text(path, json.dumps(self._record(), indent=2) + "\n")

    def _record(self) -> dict[str, Any]:
        sources = {
            source: {
                "read": counts.read,
                "dropped": dict(counts.dropped),
                "cut": dict(counts.cut),
                "bad": counts.bad,
            }
            for source, counts in self.sources.items()
        }
        return {"max_bad_rows": self.max_bad_rows, "sources": sources}

    def _of(self, source: str) -> SourceCounts:
        return self.sources.setdefault(source, SourceCounts())

    def _of_all(self, source: str) -> Iterator[tuple[str, int]]:
        counts = self.sources[source]
        yield "read", counts.read
        yield from ((f"dropped: {reason}", count) for reason, count in counts.dropped.items())
        yield from ((f"cut: {reason}", count) for reason, count in counts.cut.items())
        if counts.bad:
            yield "bad, skipped", len(counts.bad)
        yield "kept", counts.read - counts.dropped.total() - len(counts.bad)
