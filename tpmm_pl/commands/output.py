"""What commands print and where they may write."""

from __future__ import annotations

import json as json_format
import os
from pathlib import Path
from typing import Any

from tpmm_pl.types import InputError


def refuse_existing(out: Path, *, overwrite: bool) -> None:
    """Refuse an output that is there.

    Raises:
        InputError: If ``out`` exists and is not to be replaced.
    """
    if out.exists() and not overwrite:
        raise InputError(f"{out} exists; choose another --out, or replace it with --overwrite")
    first = next(folder for folder in out.absolute().parents if folder.exists())
    if out.is_file() or not first.is_dir() or not os.access(first, os.W_OK):
        raise InputError(
            f"{out} cannot be made: {first} is no folder to write into, or a file is there"
        )


def report(sentences: str, found: dict[str, Any], *, json: bool) -> None:
    """Print what was done: sentences for a reader, or one JSON object."""
    print(json_format.dumps(found) if json else sentences, flush=True)
