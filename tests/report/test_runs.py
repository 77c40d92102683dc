from __future__ import annotations

from pathlib import Path

import pytest

from tests.report.written_runs import config, gold, write_run
from tpmm_pl.report.runs import notes, read_runs
from tpmm_pl.types import InputError


def test_a_folder_of_runs_stands_for_the_runs_below_it(tmp_path: Path) -> None:
    for name in ("b/seed_0", "a/seed_0", "a/seed_1"):
        write_run(tmp_path / name, config(), gold(0.5))
    found = read_runs([tmp_path, tmp_path / "a" / "seed_0"])
    names = [run.path.relative_to(tmp_path).as_posix() for run in found]
    assert names == ["a/seed_0", "a/seed_1", "b/seed_0"]


def test_a_replaced_run_in_a_hidden_folder_is_left_out(tmp_path: Path) -> None:
    write_run(tmp_path / "runs" / "one", config(), gold(0.5))
    write_run(tmp_path / "runs" / "one" / ".replaced", config(), gold(0.1))
    write_run(tmp_path / "runs" / "two" / ".replaced", config(), gold(0.1))
    assert [run.path.name for run in read_runs([tmp_path / "runs"])] == ["one"]


def test_a_folder_without_runs_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"is no run: it has no trajectory/manifest\.json"):
        read_runs([tmp_path])
    with pytest.raises(InputError, match=r"there is no folder .*nowhere"):
        read_runs([tmp_path / "nowhere"])


def test_a_run_without_a_policy_is_refused(tmp_path: Path) -> None:
    write_run(tmp_path / "run", config(), gold(0.5))
    (tmp_path / "run/trajectory/manifest.json").write_text(
        '{"version": 1, "model": {}, "rounds": []}'
    )
    with pytest.raises(InputError, match="has no policy yet"):
        read_runs([tmp_path / "run"])


def test_runs_of_different_tasks_are_refused(tmp_path: Path) -> None:
    other = config()
    other["data"]["class_path"] = "tpmm_pl.data.module.PreferenceData"
    one = write_run(tmp_path / "one", config(), gold(0.5))
    two = write_run(tmp_path / "two", other, gold(0.5))
    unknown = write_run(tmp_path / "three", None, gold(0.5))
    with pytest.raises(InputError, match=r"one is of LettersData; .*two is of PreferenceData"):
        read_runs([one, two])
    assert len(read_runs([one, unknown])) == 2


@pytest.mark.parametrize("text", ["[1, 2]", "a: [1", "\udcff"])
def test_a_configuration_that_cannot_be_read_is_named(tmp_path: Path, text: str) -> None:
    run = write_run(tmp_path / "run", None, gold(0.5))
    (run / "config.yaml").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(InputError, match=r"config\.yaml cannot be read"):
        read_runs([run])


def test_the_seed_its_paths_and_places_make_no_other_configuration(tmp_path: Path) -> None:
    one = config(1, annotator={"name_or_path": "rewards/seed_1/dense", "more": ["seed_1"]})
    ten = config(10, annotator={"name_or_path": "rewards/seed_10/dense", "more": ["seed_10"]})
    runs = read_runs([
        write_run(tmp_path / "one", one, gold(0.5)), write_run(tmp_path / "ten", ten, gold(0.5))
    ])  # fmt: skip
    assert runs[0].identity == runs[1].identity
    assert [run.seed for run in runs] == [1, 10]
    assert "trainer.default_root_dir" not in runs[0].settings
    # the folder of another seed is not this one's
    other = config(1, annotator="rewards/seed_10")
    (run,) = read_runs([write_run(tmp_path / "other", other, gold(0.5))])
    assert run.settings["pairs.init_args.annotator"] == "rewards/seed_10"


def test_another_setting_is_another_configuration(tmp_path: Path) -> None:
    settings = [config(), config(method="adjacent"), config(annotator="rewards/seed_1")]
    folders = [write_run(tmp_path / str(n), one, gold(0.5)) for n, one in enumerate(settings)]
    assert len({run.identity for run in read_runs(folders)}) == 3


def test_secrets_are_not_kept(tmp_path: Path) -> None:
    settings = config(
        api_key="k-1", hub_token="k-2", api_key_env="JUDGE_KEY", max_new_tokens=7,
        url="http://me:k-3@judge:80/v1",
    )  # fmt: skip
    (run,) = read_runs([write_run(tmp_path / "run", settings, gold(0.5))])
    kept = run.config["pairs"]["init_args"]
    assert all(f"k-{n}" not in str(run.config) for n in (1, 2, 3))
    assert (kept["api_key_env"], kept["max_new_tokens"]) == ("JUDGE_KEY", 7)
    assert kept["url"] == "http://judge:80/v1"


def test_an_unfinished_run_and_what_was_noted_are_said(tmp_path: Path) -> None:
    short = write_run(tmp_path / "short", config(0), gold(0.5, 0.4))
    whole = write_run(tmp_path / "whole", config(1), gold(0.5, 0.4, 0.3))
    for run in read_runs([short, whole]):
        run.store.update(1, notes={"guard": "the guard acted", "snapshot": "not kept"})
    assert notes(read_runs([short, whole])) == [
        f"{short} is unfinished: it has 1 of 2 rounds",
        f"{short}, round 1 and 1 more: the guard acted",
    ]


def test_broken_scores_are_named(tmp_path: Path) -> None:
    (run,) = read_runs([write_run(tmp_path / "run", config(), gold(0.5))])
    assert run.scores(0) == {}
    (run.store.folder(0) / "scores.json").write_text("{")
    with pytest.raises(InputError, match=r"scores\.json cannot be read"):
        run.scores(0)
