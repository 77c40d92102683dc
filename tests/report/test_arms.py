from __future__ import annotations

from pathlib import Path

from tests.report.written_runs import arms, config, gold, write_run
from tpmm_pl.report.arms import baseline, differences


def test_runs_that_differ_in_the_seed_are_one_arm(tmp_path: Path) -> None:
    folders = [
        write_run(tmp_path / f"{strategy}-{seed}", config(seed, strategy), gold(0.5))
        for strategy in ("uniform", "last")
        for seed in (1, 0)
    ]
    found = arms(*folders)
    assert [(arm.name, arm.seeds) for arm in found] == [("uniform", [0, 1]), ("last", [0, 1])]
    assert baseline(found).name == "last"
    assert differences(found) == {"reference.init_args.strategy": ['"uniform"', '"last"']}


def test_without_iterative_dpo_the_first_arm_is_the_baseline(tmp_path: Path) -> None:
    folders = [
        write_run(tmp_path / strategy, config(0, strategy), gold(0.5))
        for strategy in ("uniform", "initial")
    ]
    assert baseline(arms(*folders)).name == "uniform"


def test_an_arm_is_named_by_what_is_unusual_in_it(tmp_path: Path) -> None:
    settings = [
        config(0, "last"),
        config(0, "learned"),
        config(0, "last", flips={"3": 0.9}, noise=None),
        config(0, "last", annotator={"class_path": "tpmm_pl.judges.RewardModelJudge"}),
    ]
    folders = [write_run(tmp_path / str(n), one, gold(0.5)) for n, one in enumerate(settings)]
    names = ["last", "learned", "last, flips 3 0.9", "last, RewardModelJudge"]
    assert [arm.name for arm in arms(*folders)] == names


def test_folders_named_after_arms_name_them(tmp_path: Path) -> None:
    runs = {"control": config(0, "initial", mixed=True), "plain": config(0, "initial")}
    folders = [
        write_run(tmp_path / name / f"seed_{seed}", {**one, "seed_everything": seed}, gold(0.5))
        for name, one in runs.items()
        for seed in (0, 1)
    ]
    assert [(arm.name, arm.seeds) for arm in arms(*folders)] == [
        ("control", [0, 1]),
        ("plain", [0, 1]),
    ]


def test_a_run_made_twice_is_no_further_seed(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / str(n), config(), gold(0.5)) for n in range(2)]
    assert [(arm.name, arm.seeds) for arm in arms(*folders)] == [("last", [0]), ("last (2)", [0])]


def test_runs_without_a_configuration_are_arms_of_their_own(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / name, None, gold(0.5)) for name in ("mine", "yours")]
    found = arms(*folders)
    assert [(arm.name, arm.seeds) for arm in found] == [("mine", []), ("yours", [])]
    assert differences(found) == {}
