"""What processes that were killed have left beside the files that they were writing."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

_BESIDE = re.compile(r"\.(?P<name>.+)\.(?P<process>\d+)(?P<old>\.old)?")
"""Names that :mod:`tpmm_pl.files` gives to what is not complete yet, or no longer in its place."""
_OF_JOBS = {"shards", ".generation"}


def remove_leftovers(folder: Path) -> list[Path]:
    """Delete what dead processes of this machine have left in a folder and below it.

    A folder that was taken out of its place, and whose successor never came, is put back.

    Args:
        folder: Of a run; nobody else may write there, but for jobs in folders of their own.

    Returns:
        What is no longer there.
    """
    found = []
    for path in sorted(folder.rglob(".*")):
        # `tpmm pairs` writes there without the run's lock, also from machines elsewhere
        if not _OF_JOBS.isdisjoint(path.relative_to(folder).parts):
            continue
        named = _BESIDE.fullmatch(path.name)
        if named is None or not path.exists() or _lives(int(named["process"])):
            continue
        place = path.with_name(named["name"])
        if named["old"] and not place.exists():
            path.rename(place)
        elif path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
        found.append(path)
    return found


def _lives(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        return True  # of another user; or a number that no process has
    return process != os.getpid()
