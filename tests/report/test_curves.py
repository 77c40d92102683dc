from __future__ import annotations

from math import exp, log, sqrt
from pathlib import Path

import pytest

from tests.report.written_runs import config, drift, gold, write_run, write_scores
from tpmm_pl.report.curves import (
    OverOptimisation,
    distances,
    domains_of,
    fit_over_optimisation,
    interval,
    round_curve,
    step_curve,
)
from tpmm_pl.report.runs import read_runs


def test_a_band_reaches_from_the_smallest_seed_to_the_largest(tmp_path: Path) -> None:
    runs = read_runs([
        write_run(tmp_path / "a", config(0), gold(0.5, 0.1, 0.9)),
        write_run(tmp_path / "b", config(1), gold(0.5, 0.4)),
        write_run(tmp_path / "c", config(2), gold(0.5, 0.7)),
    ])  # fmt: skip
    curve = round_curve(runs, "gold/in_domain")
    assert curve is not None
    assert curve.x == [0, 1, 2]
    # the last round is of one seed only
    assert curve.mean == pytest.approx([0.5, 0.4, 0.9])
    assert (curve.low, curve.high) == ([0.5, 0.1, 0.9], [0.5, 0.7, 0.9])
    assert round_curve(runs, "proxy/in_domain") is None


def test_a_single_run_has_its_own_intervals(tmp_path: Path) -> None:
    metrics = {
        "win/sft/in_domain": 0.4, "win/sft_low/in_domain": 0.3, "win/sft_high/in_domain": 0.45,
        "merge/kl/policy_sft/in_domain": 2.0, "merge/kl/policy_sft_se/in_domain": 0.5,
        "gold/in_domain": 0.5, "merge/gold/in_domain": 0.5, "length/in_domain": 7.0,
    }  # fmt: skip
    folder = write_run(tmp_path / "a", config(), [metrics])
    write_scores(folder, 0, [0.0, 1.0, 0.0, 1.0])
    (run,) = read_runs([folder])
    assert interval(run, 0, "win/sft/in_domain") == (0.4, 0.3, 0.45)
    half = 1.959964 * 0.5
    assert interval(run, 0, "merge/kl/policy_sft/in_domain") == (2.0, 2.0 - half, 2.0 + half)
    # sample variance of two zeros and two ones is 1/3
    half = 1.959964 * sqrt(1 / 3 / 4)
    assert interval(run, 0, "gold/in_domain") == pytest.approx((0.5, 0.5 - half, 0.5 + half))
    assert interval(run, 0, "merge/gold/in_domain") == (0.5, 0.5, 0.5)
    assert interval(run, 0, "length/in_domain") == (7.0, 7.0, 7.0)
    assert round_curve([run], "win/sft/in_domain") == ([0], [0.4], [0.3], [0.45])


def test_domains_begin_with_the_one_trained_on(tmp_path: Path) -> None:
    metrics = {"gold/a_shift": 1.0, "gold/in_domain": 1.0, "ship/last/greedy/gold/shipped": 1.0}
    assert domains_of(read_runs([write_run(tmp_path / "a", None, [metrics])])) == [
        "in_domain",
        "a_shift",
    ]


def test_steps_are_averaged_over_the_runs_that_logged_them() -> None:
    curve = step_curve([{0: 1.0, 10: 3.0}, {0: 2.0}])
    assert curve == ([0, 10], [1.5, 3.0], [1.0, 3.0], [2.0, 3.0])


def test_long_series_are_averaged_in_blocks() -> None:
    curve = step_curve([{step: float(step) for step in range(1000)}])
    assert len(curve.x) == 200
    assert curve.x[:2] == curve.mean[:2] == [2.0, 7.0]


def test_the_fit_finds_the_parameters_it_was_made_with() -> None:
    d = [0.0, 0.5, 1.0, 2.0, 3.0, 5.0]
    points = [(x, 0.3 + x * (0.4 - 0.25 * log(x)) if x else 0.3) for x in d]
    fit = fit_over_optimisation(points, 0.3)
    assert fit is not None
    assert (fit.alpha, fit.beta, fit.r2) == pytest.approx((0.4, 0.25, 1.0), abs=1e-12)
    assert [fit(x) for x, _ in points] == pytest.approx([y for _, y in points], abs=1e-12)
    # d (a - b log d) is highest where a = b (1 + log d)
    assert fit.peak is not None
    assert fit.peak == pytest.approx(exp(0.4 / 0.25 - 1))
    assert fit(fit.peak) > max(fit(fit.peak - 0.01), fit(fit.peak + 0.01))


@pytest.mark.parametrize(("alpha", "beta"), [(0.4, -0.1), (0.4, 0.0), (-0.5, 0.1), (2.0, 0.1)])
def test_a_peak_outside_the_points_is_not_told(alpha: float, beta: float) -> None:
    assert OverOptimisation(0.0, alpha, beta, 1.0, nearest=0.5, furthest=4.0).peak is None


def test_a_fit_explains_no_more_than_the_points_allow() -> None:
    fit = fit_over_optimisation([(1.0, 0.0), (1.0, 1.0), (2.0, 0.0), (2.0, 1.0)], 0.5)
    assert fit is not None
    assert fit.r2 == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize("points", [[], [(0.0, 1.0)] * 5, [(1.0, 1.0)] * 5, [(1.0, 1), (2.0, 2)]])
def test_without_three_distances_nothing_is_fitted(points: list[tuple[float, float]]) -> None:
    assert fit_over_optimisation(points, 0.0) is None


def test_distance_is_the_root_of_the_divergence_in_the_same_domain(tmp_path: Path) -> None:
    metrics = drift(0.5, 0.4, 0.3, 0.2, 0.1)
    metrics[1]["kl/policy_sft/in_domain"] = -0.01
    metrics[2]["kl/policy_sft/out_of_domain"] = 100.0
    (run,) = read_runs([write_run(tmp_path / "a", config(), metrics)])
    root = sqrt(2), sqrt(3)
    assert distances([run], "gold/in_domain") == [
        (0, 0.4), (0, 0.5), (root[0], 0.3), (root[1], 0.2), (2, 0.1)
    ]  # fmt: skip
    assert distances([run], "gold/out_of_domain") == []
