"""Tables of the comparisons with TRL: tokens of batches, and a row of ratios."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from alternating import Compared, spread
from hh_pairs import TokenCounts, count_tokens, in_batches
from page import markdown
from torch import nn
from trl_steps import grouped_by_length

from tpmm_pl.data.packing import pair_rows
from tpmm_pl.types import Pair

HEADER = ["against", "time", "10 - 90 %", "of the totals", "operations (10^12)"]
HEADER += ["unique / padded tokens"]


def ratio_row(
    key: str, title: str, found: Compared, counts: Sequence[TokenCounts]
) -> tuple[list[str], dict[str, float]]:
    """Return the cells of a row below ``HEADER``, and its ratios.

    Args:
        key: Under which the ratios are kept.
        title: What ours is compared with.
        found: Seconds, losses and operations.
        counts: Tokens of the batches.
    """
    values = found.ratios()
    theirs, ours = found.other.operations, found.ours.operations
    share = sum(count.unique for count in counts) / sum(count.padded for count in counts)
    ratios = {
        key: statistics.median(values),
        f"{key}_of_totals": found.ratio_of_totals(),
        f"{key}_operations": theirs / ours,
        f"{key}_unique_over_padded": share,
        f"{key}_loss_difference": found.loss_difference(),
    }
    cells = [title, f"{ratios[key]:.2f}", spread(values), f"{found.ratio_of_totals():.2f}"]
    cells += [f"{theirs / ours:.2f} ({theirs / 1e12:.2f} / {ours / 1e12:.2f})", f"{share:.2f}"]
    return cells, ratios


def token_table(pairs: Sequence[Pair], size: int) -> str:
    """Return the exact tokens of every batch of ``size`` pairs."""
    counts = [count_tokens(pair_rows(batch)) for batch in in_batches(pairs, size)]
    rows = [[str(number), *map(str, count)] for number, count in enumerate(counts)]
    return markdown(["batch", *TokenCounts._fields], rows)


def token_ranges(pairs: Sequence[Pair], size: int) -> str:
    """Return in words what batches hold, and what grouping by length saves of their padding."""
    columns = list(zip(*map(count_tokens, map(pair_rows, in_batches(pairs, size))), strict=True))
    parts = zip(TokenCounts._fields, columns, strict=True)
    ranges = ", ".join(f"{name} {min(column)} - {max(column)}" for name, column in parts)
    grouped = [count_tokens(pair_rows(b)).padded for b in grouped_by_length(pairs, size)]
    return (
        f"Tokens of a batch: {ranges}; padded on average {statistics.mean(columns[0]):.0f}, "
        f"grouped by length {statistics.mean(grouped):.0f}"
    )


def millions(model: nn.Module) -> int:
    """Return the parameters of a model in millions."""
    return round(sum(p.numel() for p in model.parameters()) / 1e6)
