"""Parts of a data set by split and rows: ``train[:10%]``, ``train[100:200]+test``, ``[:1000]``."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import NamedTuple

from tpmm_pl.types import InputError

_PART = re.compile(r"(?P<split>[\w.-]*)(?:\[(?P<start>-?\d+%?)?:(?P<stop>-?\d+%?)?\])?")


class Slice(NamedTuple):
    """Some rows of one split, as ``datasets`` writes it."""

    split: str | None = None
    start: str | None = None
    """A row, counted from the end where negative, or a percentage (``"10%"``)."""
    stop: str | None = None

    def bounds(self, count: Callable[[], int]) -> tuple[int, int | None]:
        """Return the first row and the row behind the last, counted from 0.

        Args:
            count: Counts the rows of the split; called only if the slice needs it.
        """
        given = [bound for bound in (self.start, self.stop) if bound is not None]
        if not any("%" in bound or bound.startswith("-") for bound in given):
            return int(self.start or 0), None if self.stop is None else int(self.stop)
        total = count()
        rows = slice(_absolute(self.start, total), _absolute(self.stop, total))
        return rows.indices(total)[:2]


def parse_split(text: str | None) -> list[Slice]:
    """Read a split expression; ``None`` is all there is.

    Raises:
        InputError: If it is not of this form.
    """
    if text is None:
        return [Slice()]
    parts = [_PART.fullmatch(part.strip()) for part in text.split("+")]
    found = [part for part in parts if part is not None and part.group()]
    if len(found) < len(parts):
        raise InputError(
            f"split is {text!r}; write train, train[:10%], train[100:200], [:1000], or several"
            " joined by +"
        )
    return [Slice(part["split"] or None, part["start"], part["stop"]) for part in found]


def _absolute(bound: str | None, total: int) -> int | None:
    if bound is None or not bound.endswith("%"):
        return None if bound is None else int(bound)
    return round(int(bound[:-1]) * total / 100)
