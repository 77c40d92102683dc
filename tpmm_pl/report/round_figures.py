"""Figures over rounds and optimizer steps: arms overlaid, with bands over seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from tpmm_pl.report.arms import Arm
from tpmm_pl.report.curves import Curve, domains_of, round_curve, step_curve
from tpmm_pl.report.drawing import INK, Drawing, Style, legend, panels, style

_BAND = "Lines are means over seeds, bands reach from the smallest seed to the largest"
_ALONE = "of an arm with one run the band is the 95 % interval over prompts, where it was measured."

_FIGURES: tuple[tuple[str, str, str, dict[str, str], float | None], ...] = (
    (
        "scores",
        "Gold and proxy scores",
        "Mean score of sampled answers. Gold judges what is wanted and is never trained on; the"
        " proxy labels the training pairs. A proxy that rises while gold falls is over-optimised.",
        {"gold": "gold score", "merge/gold": "gold score\nof the merge", "proxy": "proxy score"},
        None,
    ),
    (
        "divergence",
        "Divergence from the start",
        "KL(policy || start), estimated on the policy's own answers (k1).",
        {"kl/policy_sft": "KL, nats a sequence"},
        None,
    ),
    (
        "wins",
        "Win rates",
        "Share of prompts whose answer is scored above that of the starting policy, or of the"
        " policy one round before; a tie counts one half.",
        {"win/sft": "wins against\nthe start", "win/previous": "wins against\nthe round before"},
        0.5,
    ),
    (
        "accuracy",
        "Accuracy on held-out pairs",
        "Share of held-out pairs whose chosen answer the implicit reward prefers.",
        {"accuracy": "accuracy", "merge/accuracy": "accuracy\nof the merge"},
        0.5,
    ),
    (
        "length",
        "Length of answers",
        "Mean length of sampled answers; it tends to grow where length is mistaken for quality.",
        {"length": "length, tokens"},
        None,
    ),
)
"""Name, title, caption, metrics with their axis labels, and the value of no difference."""

MARGINS = {
    "rewards/margins": "reward margin, nats",
    "rewards/chosen": "reward of\nchosen, nats",
    "rewards/rejected": "reward of\nrejected, nats",
}
"""Logged values that are drawn over optimizer steps."""


def round_drawings(arms: Sequence[Arm]) -> list[Drawing]:
    """Return the figures over rounds of what any arm measured."""
    drawings = []
    for name, title, says, metrics, neutral in _FIGURES:
        domains = domains_of(run for arm in arms for run in arm.runs)
        curves = {
            (metric, domain): found
            for metric in metrics
            for domain in domains
            if any(found := [round_curve(arm.runs, f"{metric}/{domain}") for arm in arms])
        }
        if curves:
            labels = {m: label for m, label in metrics.items() if any(m == k[0] for k in curves)}
            drawings.append(
                _grid(name, title, f"{says} {_BAND}; {_ALONE}", labels, curves, neutral, arms)
            )
    return drawings


def margins_drawing(
    arms: Sequence[Arm], logged: Mapping[str, Sequence[Mapping[str, dict[int, float]]]]
) -> Drawing | None:
    """Return the figure of implicit rewards in training.

    Args:
        arms: In the order of the other figures.
        logged: By name of an arm: what each of its runs logged, by value and optimizer step.
    """
    found = {
        name: [[run[name] for run in logged[arm.name] if name in run] for arm in arms]
        for name in MARGINS
    }
    shown = [name for name, series in found.items() if any(series)]
    if not shown:
        return None
    figure, grid = panels(len(shown), 1, width=8.8, height=2.4)
    for (axes,), name in zip(grid, shown, strict=True):
        for index, series in enumerate(found[name]):
            if series:
                line = style(index)._replace(marker="")
                _draw(axes, step_curve(series), line, arms[index].name)
        axes.set_ylabel(MARGINS[name])
        axes.axhline(0, color=INK, linewidth=0.8, alpha=0.6)
    grid[-1][0].set_xlabel("optimizer step")
    legend(figure)
    says = (
        "Implicit rewards in training: beta times the log-ratio of the policy to the reference."
        " A margin can grow while both fall, so both are shown."
    )
    return Drawing("margins", "Reward margins in training", f"{says} {_BAND}.", figure)


def _grid(
    name: str,
    title: str,
    caption: str,
    labels: Mapping[str, str],
    curves: Mapping[tuple[str, str], Sequence[Curve | None]],
    neutral: float | None,
    arms: Sequence[Arm],
) -> Drawing:
    domains = list(dict.fromkeys(domain for _, domain in curves))
    figure, grid = panels(len(labels), len(domains))
    for row, (metric, label) in zip(grid, labels.items(), strict=True):
        for axes, domain in zip(row, domains, strict=True):
            for index, curve in enumerate(curves.get((metric, domain), ())):
                if curve is not None:
                    _draw(axes, curve, style(index), arms[index].name)
            if neutral is not None:
                axes.axhline(neutral, color=INK, linewidth=0.8, alpha=0.6)
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        row[0].set_ylabel(label)
    for axes, domain in zip(grid[0], domains, strict=True):
        axes.set_title(domain.replace("_", " "), loc="left")
    for axes in grid[-1]:
        axes.set_xlabel("round")
    legend(figure)
    return Drawing(name, title, caption, figure)


def _draw(axes: Axes, curve: Curve, line: Style, label: str) -> None:
    axes.plot(curve.x, curve.mean, line.line, color=line.colour, marker=line.marker, label=label)
    if curve.low != curve.high:
        axes.fill_between(
            curve.x, curve.low, curve.high, color=line.colour, alpha=0.15, linewidth=0
        )
