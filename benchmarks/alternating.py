"""Two ways of the same work take turns: CPU seconds, losses and operations of each."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, flop_registry

Step = Callable[[int], float]
"""Does the work of one batch, given its number, and returns the loss."""

LOSS_BOUND = 1e-5

_ATEN: Any = torch.ops.aten


def _as(known: Any) -> Callable[..., int]:
    formula: Any = partial(flop_registry[known])
    formula._get_raw = True  # takes tensors, as those of the registry do
    return formula


# what torch leaves out: products in place, and attention on the CPU
FORMULAS = {
    _ATEN.addmm_: _as(_ATEN.addmm),
    _ATEN.baddbmm_: _as(_ATEN.baddbmm),
    _ATEN._scaled_dot_product_flash_attention_for_cpu: _as(
        _ATEN._scaled_dot_product_flash_attention
    ),
    _ATEN._scaled_dot_product_flash_attention_for_cpu_backward: _as(
        _ATEN._scaled_dot_product_flash_attention_backward
    ),
}


@dataclass
class Measured:
    """What the batches gave for one way."""

    seconds: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    operations: int = 0
    """Of one batch."""

    def run(self, step: Step, number: int) -> None:
        """Take a step and note what it gave."""
        started = time.process_time()
        loss = step(number)
        self.seconds.append(time.process_time() - started)
        self.losses.append(loss)


@dataclass
class Compared:
    """Ours and another way on the same batches."""

    ours: Measured
    other: Measured

    def ratios(self, *, ours_more: float = 0.0, other_more: float = 0.0) -> list[float]:
        """Return the other's CPU seconds over ours, batch by batch.

        Args:
            ours_more: Seconds to add to each of our batches.
            other_more: Seconds to add to each of the other's.
        """
        both = zip(self.other.seconds, self.ours.seconds, strict=True)
        return [(other + other_more) / (ours + ours_more) for other, ours in both]

    def ratio_of_totals(self) -> float:
        """Return the other's CPU seconds for all batches over ours."""
        return sum(self.other.seconds) / sum(self.ours.seconds)

    def losses(self) -> str:
        """Return the range of our losses, and the largest difference of the other's."""
        low, high = min(self.ours.losses), max(self.ours.losses)
        return f"{low:.4f} - {high:.4f}, within {agreement(self.loss_difference())}"

    def loss_difference(self) -> float:
        """Return the largest difference of two losses of a batch."""
        both = zip(self.other.losses, self.ours.losses, strict=True)
        return max(abs(other - ours) for other, ours in both)


def alternate(ours: Step, other: Step, batches: int, counted: int) -> Compared:
    """Run both ways on every batch; who goes first alternates.

    Args:
        ours: Our way.
        other: The other way.
        batches: How many.
        counted: The batch whose operations are counted first, untimed: first steps allocate.
    """
    found = Compared(Measured(), Measured())
    found.ours.operations = operations(lambda: ours(counted))
    found.other.operations = operations(lambda: other(counted))
    turns = [(found.ours, ours), (found.other, other)]
    for number in range(batches):
        for measured, step in turns:
            measured.run(step, number)
        turns.reverse()
    return found


def operations(work: Callable[[], object]) -> int:
    """Count the floating-point operations of matrix products and attention, masked ones too."""
    with FlopCounterMode(display=False, custom_mapping=FORMULAS) as counter:
        work()
    return counter.get_total_flops()


def spread(values: Sequence[float]) -> str:
    """Return the range that holds 80 % of the values, of few the whole range."""
    if len(values) < 10:
        return f"{min(values):.2f} - {max(values):.2f}"
    low, *_, high = statistics.quantiles(values, n=10)
    return f"{low:.2f} - {high:.2f}"


def at_least(value: float, bar: float | None) -> str:
    """Say whether a ratio reaches its bar."""
    return "" if bar is None else f"at least {bar}: {_verdict(value >= bar)}"


def at_most(value: float, bar: float | None) -> str:
    """Say whether a ratio stays below its bar."""
    return "" if bar is None else f"at most {bar}: {_verdict(value <= bar)}"


def agreement(difference: float) -> str:
    """Return the difference of losses; say so where the two ways do not compute the same."""
    return f"{difference:.0e}" + ("" if difference <= LOSS_BOUND else " (NOT EQUAL)")


def _verdict(met: bool) -> str:
    return "met" if met else "NOT MET"
