from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub import ModelCard

from tpmm_pl.models.card import policy_card, reward_card
from tpmm_pl.rounds import one_hot
from tpmm_pl.trajectory import TrajectoryStore
from tpmm_pl.types import Recipe

MERGE = Recipe("learned", (0, 1, 2), ((0.5, 0.25, 0.25),))


@pytest.fixture
def store(tmp_path: Path) -> TrajectoryStore:
    store = TrajectoryStore(tmp_path)
    for index in range(3):
        store.add_snapshot(index, {"w": torch.full((2,), float(index))})
    store.update(1, notes={"start_from": "/elsewhere"})
    store.describe_model({"name": "owner/name", "revision": "v1"})
    return store


def header_of(card: str) -> dict[str, Any]:
    _, header, _ = card.split("---\n", 2)
    content: dict[str, Any] = yaml.safe_load(header)
    return content


def test_a_card_states_the_recipe_and_what_was_measured(store: TrajectoryStore) -> None:
    training = {"rounds": 2, "loss": "sigmoid", "beta": 0.1, "seed": None}
    metrics = {"gold/in_domain": 1.5}
    card = policy_card(store, MERGE, adapter=False, training=training, metrics=metrics)
    lines = card.splitlines()
    assert "A merge of 3 rounds' policies of iterative preference training." in lines
    for line in (
        "| base model | owner/name |",
        "| revision | v1 |",
        "| strategy | learned |",
        f"| recipe sha256 | {store.recipe_sha256(MERGE)} |",
        "| loss | sigmoid |",
        "| beta | 0.1 |",
        f"| 0 | start | 0.5 | {store.record(0).sha256} |",
        f"| 1 | given | 0.25 | {store.record(1).sha256} |",
        f"| 2 | trained | 0.25 | {store.record(2).sha256} |",
        "| gold/in_domain | 1.5 |",
        f"| torch | {torch.__version__} |",
    ):
        assert line in lines, line
    assert "seed" not in card


@pytest.mark.parametrize(("adapter", "library"), [(False, "transformers"), (True, "peft")])
def test_the_header_is_one_that_the_hub_reads(
    adapter: bool, library: str, store: TrajectoryStore
) -> None:
    card = policy_card(store, one_hot(2), adapter=adapter, training={}, metrics={})
    assert header_of(card) == {
        "base_model": "owner/name",
        "library_name": library,
        "pipeline_tag": "text-generation",
        "tags": ["tpmm_pl", "dpo", *(["lora"] if adapter else [])],
    }
    assert ModelCard(card).data.get("base_model") == "owner/name"
    assert "## Metrics" not in card


def test_a_folder_is_no_base_model_for_the_hub(store: TrajectoryStore, tmp_path: Path) -> None:
    for name in (str(tmp_path), "~/models/mine", "a/b/c.gguf", None):
        store.describe_model({"name": name})
        card = policy_card(store, one_hot(0), adapter=False, training={}, metrics={})
        assert "base_model" not in header_of(card)
        assert (name is None) == ("base model" not in card)


def test_a_card_publishes_the_name_of_a_folder_and_not_its_path(
    store: TrajectoryStore, tmp_path: Path
) -> None:
    store.describe_model({"name": str(tmp_path / "sft")})
    cards = [
        policy_card(store, one_hot(1), adapter=False, training={}, metrics={}),
        reward_card(store.model, {}),
    ]
    for card in cards:
        assert "| base model | sft |" in card
        assert str(tmp_path) not in card


@pytest.mark.parametrize(
    ("index", "says"),
    [(0, "The starting policy of"), (1, "A given policy of"), (2, "The policy of round 2 of")],
)
def test_a_card_of_one_snapshot_says_which(index: int, says: str, store: TrajectoryStore) -> None:
    card = policy_card(store, one_hot(index), adapter=False, training={}, metrics={})
    assert f"\n{says} iterative preference training.\n" in card


def test_of_many_groups_the_mean_coefficient_is_given(store: TrajectoryStore) -> None:
    recipe = Recipe("learned", (0, 1), ((0.5, 0.5), (1.0, 0.0)), "layer", ("a", "b"))
    card = policy_card(store, recipe, adapter=False, training={}, metrics={})
    assert "| round | weights | mean of 2 coefficients | sha256 |" in card
    assert "| 0 | start | 0.75 |" in card


def test_a_reward_models_card_names_its_start_and_metrics() -> None:
    card = reward_card({"name": "owner/name", "lora": None, "seed": 3}, {"val/accuracy": 0.75})
    assert header_of(card)["tags"] == ["tpmm_pl", "reward-model"]
    assert header_of(card)["pipeline_tag"] == "text-classification"
    assert "| base model | owner/name |" in card
    assert "| val/accuracy | 0.75 |" in card
    assert "| lora |" not in card


def test_no_name_breaks_out_of_its_row_or_into_the_header(store: TrajectoryStore) -> None:
    hostile = "owner/name\nlicense: mit\n---\n# Heading | a | b"
    store.describe_model({"name": hostile, "revision": hostile})
    training, metrics = {"loss": hostile}, {hostile: 1.0}
    cards = [
        policy_card(store, one_hot(2), adapter=False, training=training, metrics=metrics),
        reward_card({"name": hostile, "revision": hostile}, metrics),
    ]
    for card in cards:
        header = header_of(card)
        assert not {"base_model", "license"} & set(header)
        assert card.count("\n# ") == 1  # its own title
        rows = [line for line in card.splitlines() if "Heading" in line]
        assert all(line.startswith("| ") and line.endswith(" |") for line in rows)
        assert all(re.sub(r"\\\|", "", line).count("|") == 3 for line in rows)
        assert len(rows) >= 3


def test_markup_in_a_name_is_inert() -> None:
    hostile = "<img src=x onerror=alert(1)>"
    card = reward_card({"name": "owner/name", "revision": hostile}, {hostile: 1.0})
    assert "<img" not in card
    assert card.count("&lt;img src=x onerror=alert(1)&gt;") == 2
