"""What a run logged to TensorBoard."""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import SCALARS, EventAccumulator


def read_scalars(folder: Path, names: Sequence[str]) -> dict[str, dict[int, float]]:
    """Read logged values by name and optimizer step.

    Args:
        folder: Of event files; where there are none, nothing was logged.
        names: Of the values wanted; those that were not logged are left out.

    Returns:
        The last finite value of each step: a resumed run logs steps again.
    """
    if not any(folder.glob("events.out.tfevents.*")):
        return {}
    events = EventAccumulator(str(folder), size_guidance={SCALARS: 0}).Reload()
    logged = set(events.Tags()[SCALARS])
    series = {
        name: {e.step: e.value for e in events.Scalars(name) if isfinite(e.value)}
        for name in names
        if name in logged
    }
    return {name: values for name, values in series.items() if values}
