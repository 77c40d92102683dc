"""Names in a config become objects in one place, and unknown names get an answer."""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from typing import TypeVar

from tpmm_pl.types import InputError

T = TypeVar("T")


def lookup(kind: str, name: str, table: Mapping[str, T]) -> T:
    """Return ``table[name]``.

    Args:
        kind: What is named, for the message: ``"loss"``, ``"strategy"``.
        name: As written by the user.
        table: What there is.

    Raises:
        InputError: If there is no such name; the message lists the nearest ones, else all.
    """
    if name in table:
        return table[name]
    near = get_close_matches(name, table, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(table)}"
    raise InputError(f"unknown {kind} {name!r}; {hint}")
