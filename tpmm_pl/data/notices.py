"""The voice of the data modules: sentences on standard error, once in a run of many processes."""

from __future__ import annotations

import sys

from lightning.pytorch.utilities import rank_zero_only


@rank_zero_only
def say(sentence: str) -> None:
    """Print to standard error: a command may print one JSON object on standard output."""
    print(sentence, file=sys.stderr, flush=True)
