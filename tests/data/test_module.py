from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest
import yaml
from transformers import PreTrainedTokenizerBase

from tests.models.tiny import CHAT_TEMPLATE, WORDS, tiny_tokenizer
from tpmm_pl.cli import main
from tpmm_pl.data import prepare
from tpmm_pl.data.module import PreferenceData
from tpmm_pl.data.rows.sources import DataSource
from tpmm_pl.data.tokens.chat import tokenize_pairs
from tpmm_pl.noise import LabelNoise
from tpmm_pl.types import InputError, OffersPairs, OffersPrompts, Pair


def row(index: int, **changes: object) -> dict[str, object]:
    prompt = f"{WORDS[index // 26 % 26]} {WORDS[index % 26]}"
    answers = {"chosen": WORDS[(index + 1) % 26], "rejected": WORDS[(index + 2) % 26]}
    return {"prompt": prompt, **answers, "score_chosen": 1.0, "score_rejected": 0.0, **changes}


def write(path: Path, *rows: dict[str, object]) -> str:
    path.write_text("\n".join(json.dumps(one) for one in rows))
    return str(path)


@pytest.fixture
def train(tmp_path: Path) -> str:
    return write(tmp_path / "train.jsonl", *(row(index) for index in range(60)))


def set_up(
    data: PreferenceData,
    root: Path,
    *,
    rounds: int = 2,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> PreferenceData:
    source = SimpleNamespace(load_tokenizer=lambda: tokenizer or tiny_tokenizer())
    module = SimpleNamespace(policy_source=source, rounds=rounds)
    attached: Any = SimpleNamespace(lightning_module=module, default_root_dir=str(root / "run"))
    data.trainer = attached
    data.cache_dir = root / "cache"
    data.setup("fit")
    return data


def texts(pairs: Sequence[Pair]) -> list[str]:
    return [pair.prompt for pair in pairs]


def test_no_held_out_prompt_reaches_training(train: str, tmp_path: Path) -> None:
    data = set_up(PreferenceData(train, fuse_fraction=0.2, eval_fraction=0.1), tmp_path)
    trained = set(chain(*(texts(data.train_pairs(index)) for index in (1, 2, 3))))
    fuse, unseen = set(texts(data.fuse_pairs())), set(texts(data.eval_pairs()["in_domain"]))
    assert (len(trained), len(fuse), len(unseen)) == (43, 11, 6)
    assert not trained & fuse
    assert not trained & unseen
    assert not fuse & unseen


def test_prompts_that_differ_in_white_space_alone_are_on_one_side(tmp_path: Path) -> None:
    twice = [row(index // 2, prompt=f"w{index // 2}" + " " * (index % 2)) for index in range(40)]
    path = write(tmp_path / "t.jsonl", *twice)
    data = set_up(PreferenceData(path, fuse_fraction=0.5, eval_fraction=0.2), tmp_path, rounds=1)
    parts = [data.train_pairs(1), data.fuse_pairs(), data.eval_pairs()["in_domain"]]
    sides = [{text.strip() for text in texts(part)} for part in parts]
    assert [len(side) for side in sides] == [8, 8, 4]
    assert len(set.union(*sides)) == 20


@pytest.mark.parametrize("side", ["fuse", "evaluation"])
def test_a_file_that_shares_a_prompt_with_training_is_refused(
    side: str, train: str, tmp_path: Path
) -> None:
    other = write(tmp_path / "other.jsonl", row(500), row(3, chosen="w20"))
    given: dict[str, Any] = {"fuse": other} if side == "fuse" else {"evaluation": {"d": other}}
    with pytest.raises(InputError, match=r"1 prompts are in .*held-out data, among them 'w0 w3'"):
        set_up(PreferenceData(train, **given), tmp_path)


@pytest.mark.parametrize(
    ("budget", "rounds", "sizes"),
    [(None, 3, [20, 20, 20]), (25, 3, [25, 25, 25]), ("all", 2, [60, 60]), (99, 1, [60])],
)
def test_a_round_takes_its_budget(
    budget: Any, rounds: int, sizes: list[int], train: str, tmp_path: Path
) -> None:
    data = PreferenceData(train, fuse_fraction=0, eval_fraction=0, pairs_per_round=budget)
    set_up(data, tmp_path, rounds=rounds)
    parts = [texts(data.train_pairs(index + 1)) for index in range(rounds)]
    assert [len(part) for part in parts] == sizes
    if budget is None:
        assert len(set(chain(*parts))) == 60
    if budget == "all":
        assert parts[0] == parts[1]


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("pairs_per_round", 0),
        ("max_eval_pairs", -1),
        ("max_prompt_length", 0),
        ("batch_size", 0),
        ("token_budget", 0),
    ],
)
def test_a_number_out_of_range_is_refused_and_no_default_put_in_its_place(
    setting: str, value: int
) -> None:
    settings: dict[str, Any] = {setting: value}
    with pytest.raises(InputError, match=rf"is {value}[; ]"):
        PreferenceData("train.jsonl", **settings)


def test_a_budget_above_the_data_is_told(
    train: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    set_up(PreferenceData(train, pairs_per_round=99), tmp_path)
    assert "data.pairs_per_round is 99, but there are 51 training pairs" in capsys.readouterr().err


def test_what_became_of_the_rows_is_told_before_too_few_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    long = write(tmp_path / "long.jsonl", *(row(index, prompt="w1 w2 w3") for index in range(9)))
    with pytest.raises(InputError, match=r"0 distinct prompts cannot be split"):
        set_up(PreferenceData(long, max_length=2, max_prompt_length=2), tmp_path)
    assert "dropped: completion empty after truncation" in capsys.readouterr().err


def test_too_few_pairs_for_a_batch_are_refused(train: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"train\.jsonl leaves 51 training pairs a round, fewer"):
        set_up(PreferenceData(train, batch_size=64), tmp_path, rounds=1)


def test_noise_spares_evaluation_and_depends_on_the_seed(
    train: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flipped(seed: int) -> list[list[bool]]:
        monkeypatch.setenv("PL_GLOBAL_SEED", str(seed))
        data = PreferenceData(
            train, fuse_fraction=0.3, eval_fraction=0.2, noise=LabelNoise(flip=0.5)
        )
        set_up(data, tmp_path, rounds=1)
        sides = [data.train_pairs(1), data.fuse_pairs(), data.eval_pairs()["in_domain"]]
        for pair in chain(*sides):
            assert pair.flipped == (pair.score_chosen < pair.score_rejected)
        return [[pair.flipped for pair in side] for side in sides]

    first = flipped(1)
    assert [any(side) for side in first] == [True, True, False]
    assert flipped(1) == first
    assert flipped(2) != first


def test_a_changed_learning_rate_hits_the_cache_and_a_changed_template_misses_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    chats: list[dict[str, object]] = [
        {
            "prompt": [{"role": "user", "content": WORDS[index]}],
            "chosen": [{"role": "assistant", "content": WORDS[index + 1]}],
            "rejected": [{"role": "assistant", "content": WORDS[index + 2]}],
        }
        for index in range(20)
    ]
    train, rows = write(tmp_path / "d.jsonl", *chats), []

    def counting(given: Sequence[Any], *rest: Any, **settings: Any) -> Any:
        rows.append(len(given))
        return tokenize_pairs(given, *rest, **settings)

    monkeypatch.setattr(prepare, "tokenize_pairs", counting)
    set_up(PreferenceData(train, batch_size=4), tmp_path)
    told = capsys.readouterr().err
    # whatever is no part of the pairs, as a learning rate, a number of rounds, noise or a split
    changed = PreferenceData(train, fuse_fraction=0.4, batch_size=2, noise=LabelNoise(flip=0.1))
    set_up(changed, tmp_path / "run", rounds=3)
    assert rows == [20, 20], "another cache folder"
    set_up(changed, tmp_path, rounds=3)
    assert rows == [20, 20]
    assert capsys.readouterr().err.splitlines()[:2] == told.splitlines()[:2]
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE.replace("<eos>", "<system> <eos>")
    set_up(PreferenceData(train, batch_size=4), tmp_path, tokenizer=tokenizer)
    assert rows == [20, 20, 20]


def test_the_report_is_told_once_with_an_example_and_written(
    train: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    same = row(500, chosen="w1", rejected="w1")
    other = write(tmp_path / "fuse.jsonl", same, row(501))
    set_up(PreferenceData(train, fuse=other), tmp_path)
    said = capsys.readouterr()
    assert not said.out
    assert said.err.count("dropped: chosen and rejected identical") == 1
    assert said.err.count("the tokens in brackets are trained on") == 1
    parts = "training pairs: 57, 28 a round; fuse pairs: 1; evaluation pairs: 3 in_domain"
    assert parts in said.err.splitlines()
    written = json.loads((tmp_path / "run" / "data_report.json").read_text())["sources"]
    assert {Path(name).name: counts["read"] for name, counts in written.items()} == {
        "train.jsonl": 60,
        "fuse.jsonl": 2,
    }


def test_the_example_is_trained_on_and_swapped_labels_are_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train = write(tmp_path / "t.jsonl", *(row(index, prompt="w1") for index in range(20)))
    fuse = write(tmp_path / "f.jsonl", row(0, prompt="w9 w9 w9"))
    data = PreferenceData(train, fuse=fuse, eval_fraction=0, noise=LabelNoise(flip=1))
    set_up(data, tmp_path)
    said = capsys.readouterr().err
    assert "prompt    1 tokens   w1" in said
    assert "training pairs: 20 (20 swapped by noise), 10 a round; fuse pairs: 1 (1 swapped" in said
    assert "one example, its label swapped by noise;" in said


def test_the_first_skipped_rows_are_told(
    train: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lacking: dict[str, object] = {"prompt": "w1"}
    bad = write(tmp_path / "bad.jsonl", *([lacking] * 5), row(600))
    set_up(PreferenceData([train, bad], max_bad_rows=5), tmp_path)
    told = [line for line in capsys.readouterr().err.splitlines() if "bad.jsonl, line" in line]
    assert len(told) == 3
    assert told[0].startswith("skipped: ")


def test_prompts_of_pairs_can_be_answered_too(train: str, tmp_path: Path) -> None:
    doubled = write(tmp_path / "two.jsonl", *(row(index // 2) for index in range(60)))
    data = set_up(PreferenceData(doubled, fuse_fraction=0.2), tmp_path)
    assert isinstance(data, OffersPairs)
    assert isinstance(data, OffersPrompts)
    pairs, prompts = data.train_pairs(1), data.train_prompts(1)
    assert [one.text for one in prompts] == list(dict.fromkeys(texts(pairs)))
    assert len(prompts) < len(pairs)
    held_out = {one.prompt_id for one in data.fuse_prompts(0)}
    assert held_out == {pair.prompt_id for pair in data.fuse_pairs()}
    assert not held_out & {one.prompt_id for one in prompts}


def test_sources_are_mixed_by_their_weights(train: str, tmp_path: Path) -> None:
    other = write(tmp_path / "other.jsonl", *(row(index) for index in range(100, 160)))
    sources: list[Any] = [DataSource(train, weight=1), DataSource(other, weight=9)]
    data = PreferenceData(sources, fuse_fraction=0, eval_fraction=0)
    first = texts(set_up(data, tmp_path).train_pairs(1))
    known = {str(row(index)["prompt"]) for index in range(60)}
    # 60 draws at 1/10 until the other is used up: 6, five standard deviations are 12
    assert sum(text in known for text in first) < 18


def stream(tmp_path: Path, count: int) -> DataSource:
    folder = tmp_path / f"saved_{count}"
    datasets.Dataset.from_list([row(index) for index in range(count)]).save_to_disk(folder)
    return DataSource(str(folder), streaming=True)


def test_a_stream_hands_every_round_its_budget_and_a_resumed_run_skips_to_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepare, "_CHUNK", 16)
    source = stream(tmp_path, 200)
    settings: dict[str, Any] = {"pairs_per_round": 20, "max_eval_pairs": 4}
    settings |= {"fuse_fraction": 0.2, "eval_fraction": 0.2}
    data = set_up(PreferenceData(source, **settings), tmp_path)
    parts = [data.train_pairs(index) for index in (1, 2, 3)]
    assert [len(part) for part in parts] == [20, 20, 20]
    seen = [texts(part) for part in parts]
    assert len(set(chain(*seen))) == 60
    assert (len(data.fuse_pairs()), len(data.eval_pairs()["in_domain"])) == (4, 4)
    assert not set(chain(*seen)) & set(texts(data.fuse_pairs()))
    assert not set(chain(*seen)) & set(texts(data.eval_pairs()["in_domain"]))
    resumed = set_up(PreferenceData(source, **settings), tmp_path)
    assert texts(resumed.train_pairs(3)) == seen[2]
    assert texts(resumed.fuse_pairs()) == texts(data.fuse_pairs())
    assert not (tmp_path / "cache").exists(), "a stream is not kept"
    report = json.loads((tmp_path / "run" / "data_report.json").read_text())
    (counts,) = report["sources"].values()
    assert 60 < counts["read"] < 120


def test_noise_on_a_stream_spares_evaluation_and_survives_a_resume(tmp_path: Path) -> None:
    def made() -> PreferenceData:
        noise = LabelNoise(flip=0.5)
        return set_up(
            PreferenceData(stream(tmp_path, 100), pairs_per_round=16, noise=noise), tmp_path
        )

    data, resumed = made(), made()
    flipped = [[pair.flipped for pair in data.train_pairs(index)] for index in (1, 2)]
    assert any(flipped[0])
    assert [pair.flipped for pair in resumed.train_pairs(2)] == flipped[1]
    assert not any(pair.flipped for pair in data.eval_pairs()["in_domain"])


def test_a_stream_may_hold_out_nothing(tmp_path: Path) -> None:
    data = PreferenceData(stream(tmp_path, 60), pairs_per_round=16, max_eval_pairs=0)
    set_up(data, tmp_path)
    assert (len(data.fuse_pairs()), len(data.eval_pairs()["in_domain"])) == (0, 0)


@pytest.mark.parametrize("budget", [None, "all"])
def test_a_stream_needs_a_budget(budget: Any, tmp_path: Path) -> None:
    data = PreferenceData(stream(tmp_path, 20), pairs_per_round=budget)
    with pytest.raises(InputError, match=r"is streaming and data\.pairs_per_round is (None|all);"):
        set_up(data, tmp_path)


def test_a_stream_that_ends_before_a_round_is_filled_is_refused(tmp_path: Path) -> None:
    data = PreferenceData(stream(tmp_path, 60), pairs_per_round=64)
    with pytest.raises(InputError, match=r"ends after \d+ training pairs, fewer than"):
        set_up(data, tmp_path).train_pairs(1)


def test_a_stream_to_hold_out_is_refused(train: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="sets streaming, but its pairs are all read before"):
        set_up(PreferenceData(train, fuse=stream(tmp_path, 20)), tmp_path)


def parsed(
    settings: dict[str, Any],
    flags: list[str],
    root: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> dict[str, Any]:
    overlay = root / "overlay.yaml"
    overlay.write_text(yaml.safe_dump({"data": {"init_args": settings}}))
    configs = ["--config", "configs/preferences.yaml", "--config", str(overlay)]
    monkeypatch.setattr(sys, "argv", ["tpmm", "fit", *configs, *flags, "--print_config"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0
    printed: dict[str, Any] = yaml.safe_load(capsys.readouterr().out)["data"]["init_args"]
    return printed


def test_a_config_names_sources_as_a_path_a_mapping_or_a_list(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    one = {"path": "a.jsonl", "split": "[:100]", "weight": 2.0}
    two = {"path": "hub/name", "weight": 1.0, "mapping": {"prompt": "question"}}
    for flags, settings, expected in (
        (["--data.train", "pairs.jsonl"], {}, "pairs.jsonl"),
        ([], {"train": one}, one),
        ([], {"train": [one, two]}, [one, two]),
        ([], {"train": ["a.jsonl", "b.parquet"]}, ["a.jsonl", "b.parquet"]),
        (["--data.train.path", "c.csv"], {}, {"path": "c.csv"}),
    ):
        found = parsed(settings, flags, tmp_path, monkeypatch, capsys)["train"]
        assert _given(found, expected) == expected
    found = parsed(
        {"noise": {"flip": 0.1}, "evaluation": {"far": one}, "pairs_per_round": "all"},
        ["--data.max_bad_rows", "3"],
        tmp_path,
        monkeypatch,
        capsys,
    )
    assert found["noise"]["flip"] == 0.1
    assert _given(found["evaluation"]["far"], one) == one
    assert (found["pairs_per_round"], found["max_bad_rows"]) == ("all", 3)


def _given(found: Any, expected: Any) -> Any:
    # what is printed has the defaults too
    if isinstance(expected, list):
        return [_given(one, other) for one, other in zip(found, expected, strict=True)]
    return {name: found[name] for name in expected} if isinstance(expected, dict) else found
