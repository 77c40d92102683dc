"""From the names in a config to the loss of a step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from inspect import signature
from math import inf

from torch import Tensor

from tpmm_pl.losses import anchored, margin, reference_free, transport
from tpmm_pl.losses.inputs import Inputs, means, policy_and_tokens, policy_means, sums
from tpmm_pl.registry import lookup
from tpmm_pl.types import InputError, PairLogps


@dataclass(frozen=True)
class Term:
    """One loss of a weighted sum, with its settings bound."""

    name: str
    weight: float
    function: Callable[..., Tensor]
    inputs: Inputs

    @property
    def needs_reference(self) -> bool:
        """Whether the loss reads the reference's log-probabilities."""
        return self.inputs in (sums, means)

    def __str__(self) -> str:
        """Return the name and the settings, also those left at their defaults."""
        known = signature(self.function).parameters.values()
        settings = [f"{p.name} {p.default:g}" for p in known if p.kind == p.KEYWORD_ONLY]
        return f"{self.name} ({', '.join(settings)})" if settings else self.name


@dataclass(frozen=True)
class PreferenceLoss:
    """A weighted sum of losses; most often of one."""

    terms: tuple[Term, ...]

    @property
    def needs_reference(self) -> bool:
        """Whether any of the losses reads the reference's log-probabilities."""
        return any(term.needs_reference for term in self.terms)

    def __str__(self) -> str:
        """Return names, weights and settings, as ``0.8 sigmoid (beta 0.1) + 0.2 sft``."""
        if len(self.terms) == 1 and self.terms[0].weight == 1:
            return str(self.terms[0])
        return " + ".join(f"{term.weight:g} {term}" for term in self.terms)

    def parts(
        self, policy: PairLogps, reference: PairLogps, tokens: PairLogps
    ) -> dict[str, Tensor]:
        """Return each loss by its name, ``(B,)``, before its weight.

        Args:
            policy: Summed log-probabilities in nats under the policy, each ``(B,)``.
            reference: The same under the reference; not read where no loss needs it.
            tokens: The completions' tokens, each ``(B,)``.
        """
        return {
            term.name: term.function(*term.inputs(policy, reference, tokens)) for term in self.terms
        }

    def total(self, parts: Mapping[str, Tensor]) -> Tensor:
        """Return the weighted sum of parts, reduced or not."""
        first, *others = self.terms
        total = first.weight * parts[first.name]
        for term in others:
            total = total + term.weight * parts[term.name]
        return total

    def __call__(self, policy: PairLogps, reference: PairLogps, tokens: PairLogps) -> Tensor:
        """Return the weighted sum of the losses of each pair, ``(B,)``."""
        return self.total(self.parts(policy, reference, tokens))


_BETA = {"beta": "beta"}
_SMOOTHED = {**_BETA, "label_smoothing": "label_smoothing"}


@dataclass(frozen=True)
class Entry:
    """A loss, the settings it uses and what it takes of a batch."""

    function: Callable[..., Tensor]
    settings: Mapping[str, str] = field(default_factory=lambda: _BETA)
    """From a setting of the config to the function's keyword."""
    inputs: Inputs = sums


_RDPO = Entry(margin.rdpo_loss, _SMOOTHED)
_EXO = Entry(margin.exo_loss, _SMOOTHED)
_NCA, _BCO = Entry(anchored.nca_loss), Entry(anchored.bco_loss)

LOSSES: dict[str, Entry] = {
    "sigmoid": Entry(margin.dpo_loss),
    "dpo": Entry(margin.dpo_loss),
    "sigmoid_norm": Entry(margin.dpo_loss, inputs=means),
    "cdpo": Entry(margin.cdpo_loss, _SMOOTHED),
    "rdpo": _RDPO,
    "robust": _RDPO,
    "ipo": Entry(margin.ipo_loss, inputs=means),
    "hinge": Entry(margin.hinge_loss),
    "exo": _EXO,
    "exo_pair": _EXO,
    "discopop": Entry(margin.discopop_loss, {**_BETA, "discopop_tau": "tau"}),
    "apo_zero": Entry(anchored.apo_zero_loss),
    "apo_down": Entry(anchored.apo_down_loss),
    "sppo_hard": Entry(anchored.sppo_hard_loss),
    "nca": _NCA,
    "nca_pair": _NCA,
    "bco": _BCO,
    "bco_pair": _BCO,
    "aot": Entry(transport.aot_loss, _SMOOTHED),
    "aot_unpaired": Entry(transport.aot_unpaired_loss, _SMOOTHED),
    "simpo": Entry(
        reference_free.simpo_loss, {**_BETA, "simpo_gamma": "gamma"}, inputs=policy_means
    ),
    "orpo": Entry(reference_free.orpo_loss, inputs=policy_means),
    "sft": Entry(reference_free.sft_loss, {}, inputs=policy_and_tokens),
}
"""The losses by name, TRL's among them; names of one function and inputs are aliases."""


def preference_loss(
    loss: str | Sequence[str] | Mapping[str, float],
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    simpo_gamma: float | None = None,
    discopop_tau: float | None = None,
) -> PreferenceLoss:
    """Resolve losses by name; TRL's names are accepted too (``robust`` is ``rdpo``).

    Args:
        loss: A name of :data:`LOSSES`, several to be added, or several with their weights.
        beta: Of all losses that have one, ``> 0``.
        label_smoothing: Rate of swapped labels that ``cdpo``, ``rdpo``, ``aot`` and
            ``aot_unpaired`` assume, in ``[0, 0.5)``; for ``exo`` in ``(0, 0.5)``.
        simpo_gamma: Margin of ``simpo``, ``>= 0``; 0.5 if not given.
        discopop_tau: Temperature of ``discopop``, in ``(0, 1)``; 0.05 if not given.

    Raises:
        InputError: If a name is unknown or occurs twice, a value is out of range, or a setting is
            given that no loss uses.
    """
    weights = _weights(loss)
    entries = {name: lookup("loss", name, LOSSES) for name in weights}
    _refuse_aliases(entries)
    settings = {
        "beta": beta,
        "label_smoothing": label_smoothing,
        "simpo_gamma": simpo_gamma,
        "discopop_tau": discopop_tau,
    }
    given = {name: value for name, value in settings.items() if value is not None}
    _refuse_unused(entries, given)
    _check_ranges(entries, given)
    return PreferenceLoss(
        tuple(
            Term(name, weights[name], partial(entry.function, **_bound(entry, given)), entry.inputs)
            for name, entry in entries.items()
        )
    )


def _bound(entry: Entry, given: Mapping[str, float]) -> dict[str, float]:
    return {word: given[name] for name, word in entry.settings.items() if name in given}


def _weights(loss: str | Sequence[str] | Mapping[str, float]) -> dict[str, float]:
    if isinstance(loss, Mapping):
        weights = dict(loss)
    else:
        names = [loss] if isinstance(loss, str) else list(loss)
        weights = dict.fromkeys(names, 1.0)
        if len(weights) < len(names):
            raise InputError(f"the losses {names} name one twice; give a weight: {{name: weight}}")
    if not weights:
        raise InputError(f"no loss is named; there are {', '.join(LOSSES)}")
    for name, weight in weights.items():
        if not 0 < weight < inf:
            raise InputError(f"the weight of the loss {name!r} is {weight}; it must be positive")
    return weights


def _refuse_aliases(entries: Mapping[str, Entry]) -> None:
    seen: dict[tuple[object, object], str] = {}
    for name, entry in entries.items():
        other = seen.setdefault((entry.function, entry.inputs), name)
        if other != name:
            raise InputError(f"the losses {other!r} and {name!r} are the same; name one of them")


def _refuse_unused(entries: Mapping[str, Entry], given: Mapping[str, float]) -> None:
    used = {setting for entry in entries.values() for setting in entry.settings}
    for setting in ("label_smoothing", "simpo_gamma", "discopop_tau"):
        # 0 is no smoothing, whoever does not use it
        unset = setting not in given or (setting == "label_smoothing" and given[setting] == 0)
        if setting in used or unset:
            continue
        users = [name for name, entry in LOSSES.items() if setting in entry.settings]
        raise InputError(
            f"the loss {' + '.join(map(repr, entries))} does not use {setting} {given[setting]}; "
            f"choose {' or '.join(users)}, or leave it out"
        )


def _check_ranges(entries: Mapping[str, Entry], given: Mapping[str, float]) -> None:
    beta, rate = given["beta"], given["label_smoothing"]
    if not 0 < beta < inf:
        raise InputError(f"beta is {beta}; it must be positive")
    if not 0 <= rate < 0.5:
        raise InputError(f"label_smoothing is {rate}; it must be in [0, 0.5)")
    if rate == 0 and _EXO in entries.values():
        raise InputError("the loss exo needs label_smoothing in (0, 0.5); its paper uses 0.001")
    if not 0 <= given.get("simpo_gamma", 0) < inf:
        raise InputError(f"simpo_gamma is {given['simpo_gamma']}; it must be at least 0")
    if not 0 < given.get("discopop_tau", 0.5) < 1:
        raise InputError(f"discopop_tau is {given['discopop_tau']}; it must be in (0, 1)")
