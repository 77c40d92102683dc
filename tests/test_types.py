from __future__ import annotations

import json
from dataclasses import replace

import pytest
from torch import nn

from tpmm_pl.types import HasPolicy, HasReference, InputError, Recipe, RunError

RECIPE = Recipe(
    "learned",
    (0, 2),
    ((0.1, 0.9), (1 / 3, 2 / 3)),
    "layer",
    ("embeddings", "head"),
)


def test_a_recipe_survives_json_with_every_bit() -> None:
    written = json.loads(json.dumps(RECIPE.to_json()))
    assert written["coefficients"] == [[0.1, 0.9], [1 / 3, 2 / 3]]
    assert Recipe.from_json(written) == RECIPE


def test_the_hash_is_that_of_what_is_merged() -> None:
    digest = RECIPE.sha256(["a", "b"])
    assert digest == Recipe.from_json(RECIPE.to_json()).sha256(["a", "b"])
    assert len(digest) == 64
    # how the coefficients were found is not part of what they make
    assert replace(RECIPE, strategy="uniform").sha256(["a", "b"]) == digest


@pytest.mark.parametrize(
    "other",
    [
        replace(RECIPE, coefficients=((0.1, 0.9), (1 / 3, 2 / 3 + 1e-16))),
        replace(RECIPE, coefficients=((1 / 3, 2 / 3), (0.1, 0.9))),
        replace(RECIPE, grouping="block"),
        replace(RECIPE, groups=("head", "embeddings")),
    ],
)
def test_the_hash_changes_with_anything_that_is_merged(other: Recipe) -> None:
    assert other.sha256(["a", "b"]) != RECIPE.sha256(["a", "b"])


def test_the_hash_changes_with_the_snapshots() -> None:
    assert len({RECIPE.sha256(hashes) for hashes in (["a", "b"], ["b", "a"], ["a", "c"])}) == 3


def test_one_snapshot_is_a_recipe_without_more_words() -> None:
    recipe = Recipe("last", (4,))
    assert (recipe.coefficients, recipe.grouping, recipe.groups) == (((1.0,),), "model", ("model",))


def test_whatever_has_a_policy_is_recognised() -> None:
    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.policy = nn.Linear(1, 1)

    assert isinstance(Holder(), HasPolicy)
    assert not isinstance(nn.Linear(1, 1), HasPolicy)
    assert not isinstance(Holder(), HasReference)


def test_the_users_mistakes_are_value_errors_and_broken_runs_are_not() -> None:
    assert issubclass(InputError, ValueError)
    assert issubclass(RunError, RuntimeError)
    assert not issubclass(RunError, ValueError)
