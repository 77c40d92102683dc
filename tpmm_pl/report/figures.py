"""Figures of a run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from tpmm_pl.trajectory import Record

_LINES = (
    ("gold/in_domain", "gold, in domain", "#1b6ca8", "-"),
    ("gold/out_of_domain", "gold, out of domain", "#1b6ca8", ":"),
    ("proxy/in_domain", "proxy, in domain", "#c8553d", "-"),
    ("merge/gold/in_domain", "gold of the merge", "#3a7d44", "--"),
)


def gold_proxy_figure(records: Sequence[Record], out: Path, title: str) -> bool:
    """Draw gold and proxy scores and the KL to the start over rounds, as a PNG.

    Args:
        records: The rounds of a run.
        out: The file.
        title: Above the figure.

    Returns:
        Whether there was something to draw: a run without a gold judge has no such figure.
    """
    drawn = [line for line in _LINES if any(line[0] in r.metrics for r in records)]
    if not any(name.startswith("gold") for name, *_ in drawn):
        return False
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    scores, divergence = figure.subplots(1, 2, width_ratios=(3, 2))
    for name, label, colour, style in drawn:
        points = [(r.round, r.metrics[name]) for r in records if name in r.metrics]
        rounds, values = zip(*points, strict=True)
        scores.plot(rounds, values, style, color=colour, label=label, marker="o", markersize=3)
    scores.set_ylabel("mean score of sampled answers")
    scores.legend(frameon=False, fontsize="small")
    points = [(r.round, r.metrics.get("kl/policy_sft/in_domain", 0.0)) for r in records]
    divergence.plot(*zip(*points, strict=True), color="#444444", marker="o", markersize=3)
    divergence.set_ylabel("KL(policy || start), nats a sequence")
    for axes in (scores, divergence):
        axes.set_xlabel("round")
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=150)
    return True
