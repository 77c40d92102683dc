"""From the settings of ``tpmm merge`` to what is done with the sources."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import isfinite
from pathlib import Path
from typing import Any, NamedTuple

import torch

from tpmm_pl.commands.merging.methods import (
    Merge,
    TaskMerge,
    ema_coefficients,
    grouped,
    linear,
    onto_base,
    slerp,
)
from tpmm_pl.commands.merging.sources import Sources, read_base
from tpmm_pl.commands.merging.task_vectors import dare_merge, ties_merge
from tpmm_pl.modules.fusion import FusionSettings
from tpmm_pl.types import InputError, StateDict


class Asked(NamedTuple):
    """Settings of all methods, as ``tpmm merge`` explains them."""

    first: str
    """The first source as the user calls it."""
    dtype: torch.dtype
    """Of the merge."""
    weights: tuple[float, ...] | None = None
    normalize: bool = False
    pairs: Path | None = None
    fusion: FusionSettings = FusionSettings()
    max_length: int = 1024
    alpha: float = 0.6
    t: float = 0.5
    base: str | None = None
    density: float = 0.2
    seed: int = 0
    trust_remote_code: bool = False


class Plan(NamedTuple):
    """How each tensor is made."""

    states: list[StateDict]
    """What is merged."""
    merge: Merge
    facts: dict[str, Any]
    """For the recipe: coefficients and settings."""
    sentences: tuple[str, ...] = ()
    """For the reader."""


def _linear(sources: Sources, asked: Asked) -> Plan:
    weights = asked.weights or (1.0,) * len(sources.models)
    _check_weights(weights, [model.name for model in sources.models])
    normalise = asked.normalize or asked.weights is None
    merge = linear(weights, asked.dtype, normalise=normalise)
    total = sum(weights) if normalise else 1.0
    return Plan(sources.states, merge, {"coefficients": [[w / total for w in weights]]})


def _ema(sources: Sources, asked: Asked) -> Plan:
    row = ema_coefficients(len(sources.models), asked.alpha)
    facts = {"alpha": asked.alpha, "coefficients": [list(row)]}
    return Plan(sources.states, linear(row, asked.dtype, normalise=False), facts)


def _slerp(sources: Sources, asked: Asked) -> Plan:
    if len(sources.models) != 2:
        raise InputError(f"slerp merges two models, not {len(sources.models)}; give another method")
    if not isfinite(asked.t):
        raise InputError(f"--t is {asked.t}; give a number, from 0 to 1 between the models")
    return Plan(sources.states, slerp(asked.t), {"t": asked.t})


def _ties(sources: Sources, asked: Asked) -> Plan:
    return _task_vectors(ties_merge, lambda count: 1.0, sources, asked)


def _dare(sources: Sources, asked: Asked) -> Plan:
    plan = _task_vectors(dare_merge, lambda count: 1 / count, sources, asked)
    return plan._replace(facts={**plan.facts, "seed": asked.seed})


def _task_vectors(
    method: TaskMerge, default: Callable[[int], float], sources: Sources, asked: Asked
) -> Plan:
    if asked.base is None:
        base, *models = sources.models
    else:
        models = sources.models
        trust = asked.trust_remote_code
        base = read_base(asked.base, sources, asked.first, trust_remote_code=trust)
    weights = asked.weights or (default(len(models)),) * len(models)
    _check_weights(weights, [model.name for model in models])
    merge = onto_base(method, base.state, weights, asked.density, asked.seed)
    facts = {"base": base.name, "weights": list(weights), "density": asked.density}
    return Plan([model.state for model in models], merge, facts)


def _learned(sources: Sources, asked: Asked) -> Plan:
    # models and their data come in: nothing that the other methods need
    from tpmm_pl.commands.merging.learned import learn

    if asked.pairs is None:
        raise InputError("learned coefficients need pairs that no source saw; give --pairs FILE")
    learned = learn(
        sources,
        asked.pairs,
        asked.fusion,
        dtype=str(asked.dtype).removeprefix("torch."),
        max_length=asked.max_length,
        seed=asked.seed,
        trust_remote_code=asked.trust_remote_code,
    )
    recipe = learned.recipe
    facts = {
        "coefficients": [list(row) for row in recipe.coefficients],
        "grouping": recipe.grouping,
        "groups": list(recipe.groups),
        "loss_uniform": learned.loss_uniform,
        "loss": learned.loss,
        "steps": learned.steps,
    }
    sentences = [
        f"loss on the pairs {learned.loss_uniform:.4f} (plain average) -> {learned.loss:.4f} nats"
        f" in {learned.steps} steps"
    ]
    if (warning := learned.warning()) is not None:
        sentences.append(f"warning: {warning}")
    merge = grouped(recipe, learned.group_of)
    return Plan(sources.states, merge, facts, tuple(sentences))


METHODS: dict[str, Callable[[Sources, Asked], Plan]] = {
    "linear": _linear,
    "learned": _learned,
    "ema": _ema,
    "slerp": _slerp,
    "ties": _ties,
    "dare": _dare,
}


def _check_weights(weights: Sequence[float], names: Sequence[str]) -> None:
    if len(weights) != len(names) or not all(map(isfinite, weights)):
        raise InputError(
            f"--weights has {len(weights)} numbers, {list(weights)}, for {len(names)} models,"
            f" {', '.join(names)}; give one each"
        )
