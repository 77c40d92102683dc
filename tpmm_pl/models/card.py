"""Model cards: what an exported folder is and how it was made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import yaml

from tpmm_pl.models.location import is_hub_id
from tpmm_pl.trajectory import GIVEN, TrajectoryStore
from tpmm_pl.types import Recipe

CARD = "README.md"

_VERSIONS = ("tpmm_pl", "torch", "transformers", "peft", "lightning")


def policy_card(
    store: TrajectoryStore,
    recipe: Recipe,
    *,
    adapter: bool,
    training: Mapping[str, Any],
    metrics: Mapping[str, float],
) -> str:
    """Return the card of a policy or a merge of policies.

    Args:
        store: The trajectory that it comes from.
        recipe: Which snapshots it is.
        adapter: Whether the folder holds an adapter instead of a model.
        training: What is known of the training, by name.
        metrics: What was measured on this model.
    """
    count, base = len(recipe.snapshots), store.model.get("name")
    what = (
        _one(store, recipe.snapshots[0]) if count == 1 else f"A merge of {count} rounds' policies"
    )
    header = _header(base, adapter, ["dpo", *(["merge"] if count > 1 else [])], "text-generation")
    facts = {
        "base model": _published(base),
        "revision": store.model.get("revision"),
        "strategy": recipe.strategy,
        "coefficients shared by": recipe.grouping,
        "recipe sha256": store.recipe_sha256(recipe),
        **training,
    }
    return _page(
        header,
        "Policy",
        f"{what} of iterative preference training.",
        {
            "Recipe": _table(("setting", "value"), _known(facts)),
            "Snapshots": _snapshots(store, recipe),
            "Metrics": _metrics(metrics),
        },
    )


def reward_card(description: Mapping[str, Any], metrics: Mapping[str, float]) -> str:
    """Return the card of a reward model.

    Args:
        description: Of the model that training started from, as its source describes it.
        metrics: What was measured last.
    """
    base = description.get("name")
    settings = {name: value for name, value in description.items() if name != "name"}
    return _page(
        _header(base, False, ["reward-model"], "text-classification"),
        "Reward model",
        "One score a text: higher is better; only differences mean something.",
        {
            "Training": _table(
                ("setting", "value"), _known({"base model": _published(base), **settings})
            ),
            "Metrics": _metrics(metrics),
        },
    )


def _header(base: Any, adapter: bool, tags: Sequence[str], task: str) -> dict[str, Any]:
    header: dict[str, Any] = {
        "library_name": "peft" if adapter else "transformers",
        "pipeline_tag": task,
        "tags": ["tpmm_pl", *tags, *(["lora"] if adapter else [])],
    }
    # the hub takes ids only
    return {"base_model": base, **header} if base and is_hub_id(base) else header


def _page(header: Mapping[str, Any], title: str, says: str, sections: Mapping[str, str]) -> str:
    written = yaml.safe_dump(dict(header), sort_keys=False, allow_unicode=True)
    sections = {**sections, "Versions": _table(("package", "version"), _versions())}
    parts = [f"## {name}\n\n{text}" for name, text in sections.items() if text]
    return "\n\n".join([f"---\n{written}---\n\n# {title}", says, *parts]) + "\n"


def _snapshots(store: TrajectoryStore, recipe: Recipe) -> str:
    rows = []
    for column, index in enumerate(recipe.snapshots):
        record = store.record(index)
        mean = sum(row[column] for row in recipe.coefficients) / len(recipe.coefficients)
        rows.append((str(index), _made(store, index), f"{mean:.6g}", record.sha256 or ""))
    several = len(recipe.groups) > 1
    coefficient = f"mean of {len(recipe.groups)} coefficients" if several else "coefficient"
    return _table(("round", "weights", coefficient, "sha256"), rows)


def _one(store: TrajectoryStore, index: int) -> str:
    names = {"start": "The starting policy", "given": "A given policy"}
    return names.get(_made(store, index), f"The policy of round {index}")


def _made(store: TrajectoryStore, index: int) -> str:
    given = GIVEN in store.record(index).notes
    return "given" if given else "trained" if index else "start"


def _published(base: str | None) -> str | None:
    # the folders of the machine that trained are nobody else's concern
    return base if base is None or is_hub_id(base) else Path(base).name


def _metrics(metrics: Mapping[str, float]) -> str:
    rows = [(name, f"{value:.6g}") for name, value in sorted(metrics.items())]
    return _table(("metric", "value"), rows) if rows else ""


def _known(facts: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [(name, str(value)) for name, value in facts.items() if value is not None]


def _versions() -> list[tuple[str, str]]:
    found = []
    for name in _VERSIONS:
        try:
            found.append((name, version(name)))
        except PackageNotFoundError:
            # a checkout on the path has no metadata
            continue
    return found


def _table(names: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [names, ["---"] * len(names), *rows]
    # names come from folders and data: none may break its row, nor be markup of a page
    cells = [[escape(cell, quote=False) for cell in line] for line in lines]
    rows = [[cell.replace("|", "\\|").replace("\n", " ") for cell in line] for line in cells]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
