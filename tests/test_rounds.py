from __future__ import annotations

from math import log

import pytest
import torch

from tpmm_pl.merging import linear_merge
from tpmm_pl.rounds import (
    STRATEGIES,
    RoundSchedule,
    check_strategy,
    entropy,
    fixed_recipe,
    one_hot,
    run_seed,
)
from tpmm_pl.types import InputError, Recipe


def ema(rounds: int, alpha: float) -> Recipe:
    recipe = None
    for index in range(rounds + 1):
        recipe = fixed_recipe("ema", index, alpha=alpha, previous=recipe)
    assert recipe is not None
    return recipe


def merged(recipe: Recipe, snapshots: list[torch.Tensor]) -> torch.Tensor:
    states = [{"w": snapshots[index]} for index in recipe.snapshots]
    return linear_merge(states, torch.tensor(recipe.coefficients[0], dtype=torch.float64))["w"]


@pytest.mark.parametrize(
    ("strategy", "snapshots", "coefficients"),
    [
        ("last", (3,), (1.0,)),
        ("initial", (0,), (1.0,)),
        ("uniform", (0, 1, 2, 3), (0.25, 0.25, 0.25, 0.25)),
        ("window", (2, 3), (0.5, 0.5)),
    ],
)
def test_the_coefficients_after_round_3(
    strategy: str, snapshots: tuple[int, ...], coefficients: tuple[float, ...]
) -> None:
    recipe = fixed_recipe(strategy, 3, window=2)
    assert recipe == Recipe(strategy, snapshots, (coefficients,))


def test_the_ema_by_hand() -> None:
    # 0.6 of the newest; 0.4 of what was: 0.6 * 0.4 and 0.4 * 0.4
    recipe = ema(2, 0.6)
    assert recipe.snapshots == (0, 1, 2)
    assert recipe.coefficients[0] == pytest.approx((0.16, 0.24, 0.6))
    assert ema(0, 0.6) == Recipe("ema", (0,), ((1.0,),))


@pytest.mark.parametrize("strategy", ["last", "initial", "uniform", "window", "ema"])
def test_before_the_first_round_every_reference_is_the_start(strategy: str) -> None:
    recipe = fixed_recipe(strategy, 0)
    assert (recipe.snapshots, recipe.coefficients) == ((0,), ((1.0,),))


@pytest.mark.parametrize("strategy", ["uniform", "window", "ema"])
@pytest.mark.parametrize("index", [1, 4, 9])
def test_coefficients_sum_to_1(strategy: str, index: int) -> None:
    recipe = ema(index, 0.3) if strategy == "ema" else fixed_recipe(strategy, index)
    assert len(recipe.snapshots) == len(recipe.coefficients[0])
    assert sum(recipe.coefficients[0]) == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize(("alpha", "kept"), [(1.0, 4), (0.0, 0)])
def test_an_ema_of_alpha_1_is_the_previous_policy_and_of_0_the_start(
    alpha: float, kept: int
) -> None:
    generator = torch.Generator().manual_seed(0)
    snapshots = list(torch.randn(5, 100, generator=generator))
    assert torch.equal(merged(ema(4, alpha), snapshots), snapshots[kept])


@pytest.mark.parametrize("alpha", [0.1, 0.6, 0.9])
def test_the_coefficients_of_an_ema_are_the_recursion(alpha: float) -> None:
    generator = torch.Generator().manual_seed(0)
    snapshots = list(torch.randn(6, 100, dtype=torch.float64, generator=generator))
    reference = snapshots[0]
    for policy in snapshots[1:]:
        reference = alpha * policy + (1 - alpha) * reference
    torch.testing.assert_close(merged(ema(5, alpha), snapshots), reference, atol=1e-12, rtol=0)


def test_a_window_wider_than_the_trajectory_is_the_average() -> None:
    wide = fixed_recipe("window", 2, window=9)
    assert wide.coefficients == fixed_recipe("uniform", 2).coefficients
    assert fixed_recipe("window", 2, window=1).snapshots == (2,)


def test_settings_out_of_range_are_refused() -> None:
    with pytest.raises(InputError, match="window is 0; it must be at least 1 snapshot"):
        fixed_recipe("window", 2, window=0)
    for alpha in (-0.1, 1.1):
        with pytest.raises(InputError, match=r"alpha is .*; it must be in \[0, 1\]"):
            fixed_recipe("ema", 2, alpha=alpha)


def test_learning_needs_pairs_and_unknown_strategies_name_the_nearest() -> None:
    with pytest.raises(InputError, match="the strategy 'learned' needs pairs to learn from"):
        fixed_recipe("learned", 2)
    with pytest.raises(InputError, match="unknown strategy 'learnt'; did you mean learned"):
        fixed_recipe("learnt", 2)
    with pytest.raises(InputError, match="unknown strategy"):
        check_strategy("mean")
    for strategy in STRATEGIES:
        check_strategy(strategy)


def test_the_entropy_is_log_k_of_an_average_and_0_of_one_snapshot() -> None:
    assert entropy(fixed_recipe("uniform", 3)) == pytest.approx(log(4))
    assert entropy(one_hot(3)) == 0
    assert entropy(Recipe("learned", (0, 1), ((1.0, 0.0), (0.5, 0.5)))) == pytest.approx(log(2) / 2)


def test_negative_coefficients_count_by_their_size() -> None:
    assert entropy(Recipe("learned", (0, 1), ((2.0, -2.0),))) == pytest.approx(log(2))


def test_epochs_make_rounds_from_1() -> None:
    schedule = RoundSchedule(epochs_per_round=2)
    assert [schedule.round_of(epoch) for epoch in range(5)] == [1, 1, 2, 2, 3]
    assert [schedule.finished(epochs) for epochs in range(5)] == [0, 0, 1, 1, 2]


def test_the_seed_is_that_of_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PL_GLOBAL_SEED", "7")
    assert run_seed() == 7
    monkeypatch.delenv("PL_GLOBAL_SEED")
    assert run_seed() == 0
