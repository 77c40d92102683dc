"""What a policy is worth: scores of its completions, their divergence and length, accuracy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tpmm_pl.losses import log_ratio_margin
from tpmm_pl.rounds import entropy
from tpmm_pl.stats import kl_k1, kl_k3, wilson_interval, win_rate
from tpmm_pl.trajectory import Record
from tpmm_pl.types import Completion, Pair, PairLogps


@dataclass
class Answers:
    """One policy's completions of a domain's prompts, and what judges said of them."""

    completions: list[Completion]
    scores: dict[str, list[float]] = field(default_factory=dict)
    """By judge (``gold``, ``proxy``), one a completion."""
    start_logps: list[float] | None = None
    """Log-probabilities of the same completions under the starting policy, in nats."""

    def metrics(self, domain: str) -> dict[str, float]:
        """Return means over completions: scores, length in tokens, KL to the start in nats."""
        found = {f"{judge}/{domain}": _mean(values) for judge, values in self.scores.items()}
        found[f"length/{domain}"] = _mean([len(c.ids) for c in self.completions])
        if self.start_logps is not None:
            policy = torch.tensor([c.logps for c in self.completions], dtype=torch.float64)
            start = torch.tensor(self.start_logps, dtype=torch.float64)
            k1 = kl_k1(policy, start)
            found[f"kl/policy_sft/{domain}"] = float(k1.mean())
            found[f"kl/policy_sft_k3/{domain}"] = float(kl_k3(policy, start).mean())
            if len(k1) > 1:
                found[f"kl/policy_sft_se/{domain}"] = float(k1.std()) / len(k1) ** 0.5
        return found


def win_metrics(
    ours: Sequence[float], theirs: Sequence[float], opponent: str, domain: str
) -> dict[str, float]:
    """Return the win rate against an opponent on the same prompts, with its 95 % interval."""
    generator = torch.Generator().manual_seed(0)
    estimate = win_rate(torch.tensor(ours), torch.tensor(theirs), generator=generator)
    name = f"win/{opponent}"
    return {
        f"{name}/{domain}": estimate.value,
        f"{name}_low/{domain}": estimate.low,
        f"{name}_high/{domain}": estimate.high,
    }


def accuracy_metrics(pairs: Sequence[Pair], logps: PairLogps, domain: str) -> dict[str, float]:
    """Return how often the implicit reward prefers the chosen completion, with its interval.

    The implicit reward is the log-ratio to the reference stored with the pairs.

    Args:
        pairs: Held-out pairs with reference log-probabilities.
        logps: Under the policy, ``(len(pairs),)`` each.
        domain: Ends the metrics' names.
    """
    reference = PairLogps(
        torch.tensor([pair.ref_chosen_logps for pair in pairs]),
        torch.tensor([pair.ref_rejected_logps for pair in pairs]),
    )
    right: Tensor = log_ratio_margin(logps, reference) > 0
    estimate = wilson_interval(int(right.sum()), len(pairs))
    return {
        f"accuracy/{domain}": estimate.value,
        f"accuracy_low/{domain}": estimate.low,
        f"accuracy_high/{domain}": estimate.high,
    }


_COLUMNS = (
    ("gold/in_domain", "gold", 6, "{:z.3f}"),
    ("gold/out_of_domain", "gold out", 8, "{:z.3f}"),
    ("merge/gold/in_domain", "merge gold", 10, "{:z.3f}"),
    ("proxy/in_domain", "proxy", 6, "{:z.3f}"),
    ("win/sft/in_domain", "win sft", 7, "{:z.2f}"),
    ("win/previous/in_domain", "win prev", 8, "{:z.2f}"),
    ("kl/policy_sft/in_domain", "KL nats", 7, "{:z.2f}"),
    ("length/in_domain", "tokens", 6, "{:z.1f}"),
    ("accuracy/in_domain", "accuracy", 18, "{:z.3f}"),
)


def table_header(metrics: Mapping[str, float]) -> str:
    """Return the headings of the round table, for the columns that a run measures."""
    shown = [f"{title:>{width}}" for name, title, width, _ in _shown(metrics)]
    return " ".join([f"{'round':>5}", *shown, " reference (coefficients by round)"])


def table_row(record: Record, columns: Mapping[str, float]) -> str:
    """Return a round's row: its metrics, and the recipe of the next reference.

    Args:
        record: The round.
        columns: Whose names decide which columns there are, the same in every row.
    """
    cells = [f"{record.round:>5}"]
    for name, _, width, form in _shown(columns):
        cells.append(f"{_cell(record.metrics, name, form):>{width}}")
    return " ".join([*cells, f" {_reference(record)}"])


def _cell(metrics: Mapping[str, float], name: str, form: str) -> str:
    if name not in metrics:
        return "-"
    value = form.format(metrics[name])
    if not name.startswith("accuracy/"):
        return value
    low, high = (metrics[name.replace("/", f"_{end}/")] for end in ("low", "high"))
    return f"{value} [{low:.2f}, {high:.2f}]"


def _shown(metrics: Mapping[str, float]) -> list[tuple[str, str, int, str]]:
    return [column for column in _COLUMNS if column[0] in metrics]


def _reference(record: Record) -> str:
    recipe = record.recipe
    if recipe is None:
        return "-"
    means = torch.tensor(recipe.coefficients, dtype=torch.float64).mean(0).tolist()
    weights = " ".join(f"{k}:{c:.2f}" for k, c in zip(recipe.snapshots, means, strict=True))
    text = f"{recipe.strategy} [{weights}]"
    if len(recipe.snapshots) > 1:
        text += f" entropy {entropy(recipe):.2f}"
    return " ".join([text, *(f"({note})" for note in record.notes.values())])


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
