from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from torch import nn

from tpmm_pl.types import HasPolicy, HasReference, InputError, Recipe, RunError, TokenTree

RECIPE = Recipe(
    "learned",
    (0, 2),
    ((0.1, 0.9), (1 / 3, 2 / 3)),
    "layer",
    ("embeddings", "head"),
)

# 1 2 | 3 and 1 2 | 4 5, and 1 |, a beginning of both of which nothing is scored
TREE = TokenTree(
    tokens=torch.tensor([1, 2, 3, 4, 5]),
    positions=torch.tensor([0, 1, 2, 2, 3]),
    ends=torch.tensor([5, 5, 3, 5, 5]),
    leaves=torch.tensor([2, 4, 0]),
    states=torch.tensor([1, 3]),
    targets=torch.tensor([3, 4, 5]),
    state_of=torch.tensor([0, 0, 1]),
    row_of=torch.tensor([0, 1, 1]),
)


def test_scored_tokens_are_counted_and_summed_by_row() -> None:
    assert TREE.lengths().tolist() == [1.0, 2.0, 0.0]
    values = torch.tensor([-1.0, -2.0, -0.5], requires_grad=True)
    sums = TREE.sums(values)
    assert sums.tolist() == [-1.0, -2.5, 0.0]
    (sums * torch.tensor([1.0, 10.0, 100.0])).sum().backward()
    assert values.grad is not None
    assert values.grad.tolist() == [1.0, 10.0, 10.0]
    assert {sums.dtype, TREE.lengths().dtype} == {torch.float32}


def test_a_token_is_part_of_the_rows_that_end_below_it_or_at_it() -> None:
    assert TREE.multiplicity().tolist() == [3, 2, 1, 1, 1]


def test_long_completions_are_summed_in_float64() -> None:
    # one token of -1024 nats, then 4,096 of -2^-14: each is lost beside 1024 in float32
    count, small = 4096, 2.0**-14
    tree = TREE._replace(row_of=torch.zeros(count + 1, dtype=torch.long))
    values = torch.tensor([-1024.0, *[-small] * count])
    assert tree.sums(values)[0].item() == pytest.approx(-1024 - count * small, abs=1e-4)


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


def test_recipes_merge_alike_whatever_strategy_or_grouping_says_so() -> None:
    newest = Recipe("ema", (0, 1, 2), ((0.0, 0.0, 1.0),))
    assert newest.merges_as(Recipe("last", (2,)))
    groups = ("a", "b")
    by_group = Recipe("learned", (1, 2), ((0.0, 1.0), (0.0, 1.0)), "layer", groups)
    assert by_group.merges_as(newest)
    assert not newest.merges_as(Recipe("last", (1,)))
    assert not newest.merges_as(Recipe("uniform", (1, 2), ((0.5, 0.5),)))
    mixed = Recipe("learned", (1, 2), ((0.0, 1.0), (1.0, 0.0)), "layer", groups)
    assert mixed.merges_as(Recipe("uniform", (2, 1), ((1.0, 0.0), (0.0, 1.0)), "layer", groups))
    assert not mixed.merges_as(
        Recipe("learned", (1, 2), ((0.0, 1.0), (1.0, 0.0)), "block", ("c", "d"))
    )
