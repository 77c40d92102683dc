"""The table of a dry run: names, aligned values with units, and where each comes from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple


class Row(NamedTuple):
    """One figure."""

    name: str
    value: str
    basis: str = ""
    """``counted``, ``measured``, ``estimated``, ``at most``, and of what."""


def table(sections: Mapping[str, Sequence[Row]]) -> str:
    """Return sections one below the other, their columns aligned throughout."""
    rows = [row for section in sections.values() for row in section]
    name, value = (max(len(row[column]) for row in rows) for column in (0, 1))
    blocks = []
    for title, section in sections.items():
        lines = [f"  {r.name:<{name}}  {r.value:>{value}}  {r.basis}".rstrip() for r in section]
        blocks.append("\n".join([title, *lines]))
    return "\n\n".join(blocks)


def size(count: float) -> str:
    """Return bytes with a unit, three digits at least: ``513 MiB``."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" or count >= 100 else f"{count:.3g} {unit}"
        count /= 1024
    return f"{count:,.3g} TiB" if count < 1000 else f"{count:,.0f} TiB"


def duration(seconds: float) -> str:
    """Return a time with the unit that a reader would use: ``4.2 s``, ``35 min``, ``7.5 h``."""
    for limit, unit, name in ((120, 1, "s"), (7200, 60, "min"), (172_800, 3600, "h")):
        if seconds < limit:
            return (
                f"{seconds / unit:.2g} {name}"
                if seconds / unit < 10
                else f"{seconds / unit:.0f} {name}"
            )
    return f"{seconds / 86_400:.1f} days"
