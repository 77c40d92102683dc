from __future__ import annotations

import json
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.models.tiny import WORDS, tiny_tokenizer
from tpmm_pl.data.prompts import PromptData
from tpmm_pl.data.rows.sources import DataSource
from tpmm_pl.types import InputError, OffersPrompts, Prompt


def write(path: Path, *prompts: object) -> str:
    path.write_text("\n".join(json.dumps({"prompt": prompt}) for prompt in prompts))
    return str(path)


@pytest.fixture
def train(tmp_path: Path) -> str:
    return write(
        tmp_path / "train.jsonl", *(f"{WORDS[i % 26]} {WORDS[i // 26]}" for i in range(40))
    )


def set_up(data: PromptData, root: Path, *, template: bool = True) -> PromptData:
    source = SimpleNamespace(load_tokenizer=lambda: tiny_tokenizer(template=template))
    module = SimpleNamespace(policy_source=source)
    attached: Any = SimpleNamespace(lightning_module=module, default_root_dir=str(root / "run"))
    data.trainer = attached
    data.setup("fit")
    return data


def texts(prompts: list[Prompt]) -> list[str]:
    return [prompt.text for prompt in prompts]


def test_no_held_out_prompt_reaches_training(train: str, tmp_path: Path) -> None:
    data = set_up(
        PromptData(
            train,
            eval_fraction=0.1,
            fuse_fraction=0.25,
            prompts_per_round=9,
            fuse_prompts_per_round=3,
        ),
        tmp_path,
    )
    assert isinstance(data, OffersPrompts)
    rounds = [texts(data.train_prompts(index)) for index in (1, 2, 3, 4)]
    fuse = [texts(data.fuse_prompts(index)) for index in (0, 1, 2)]
    unseen = texts(data.eval_prompts()["in_domain"])
    assert [*map(len, rounds), *map(len, fuse), len(unseen)] == [9, 9, 9, 9, 3, 3, 3, 4]
    assert rounds[3] == rounds[0], "27 prompts are used up after three rounds"
    sides = [set(chain(*rounds)), set(chain(*fuse)), set(unseen)]
    assert [len(side) for side in sides] == [27, 9, 4]
    assert len(set.union(*sides)) == 40


def test_conversations_keep_their_turns_and_the_report_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    turns = [{"role": "user", "content": "w1 w2"}]
    other = [{"role": "user", "content": "w3"}]
    path = write(tmp_path / "p.jsonl", turns, other)
    data = set_up(PromptData(path, eval_fraction=0, fuse_fraction=0), tmp_path)
    known = {prompt.text: prompt.messages for prompt in data.train_prompts(1)}
    assert known["<user> w1 w2 <eos>\n<assistant> "] == tuple(turns)
    said = capsys.readouterr()
    assert not said.out
    assert "p.jsonl" in said.err
    written = json.loads((tmp_path / "run" / "data_report.json").read_text())
    assert written["sources"][path]["read"] == 2


def test_a_prompt_given_on_two_sides_is_refused(train: str, tmp_path: Path) -> None:
    other = write(tmp_path / "other.jsonl", "w9 w9", "w3 w0")
    with pytest.raises(InputError, match=r"1 prompts are in .*held-out data, among them 'w3 w0'"):
        set_up(PromptData(train, evaluation={"near": other}), tmp_path)


@pytest.mark.parametrize("setting", ["streaming", "weight"])
def test_a_setting_without_effect_is_refused(setting: str, train: str, tmp_path: Path) -> None:
    settings: dict[str, Any] = {setting: True}
    source = DataSource(train, **settings)
    with pytest.raises(InputError, match=rf"train\.jsonl sets {setting}, but .*; leave it out"):
        set_up(PromptData(source), tmp_path)


def test_a_prompt_that_comes_again_is_answered_once_and_counted(tmp_path: Path) -> None:
    paths = [write(tmp_path / name, "w1", "w2", "w1  ") for name in ("a.jsonl", "b.jsonl")]
    data = set_up(PromptData(list(paths), eval_fraction=0, fuse_fraction=0), tmp_path)
    assert sorted(texts(data.train_prompts(1))) == ["w1", "w2"]
    sources = json.loads((tmp_path / "run" / "data_report.json").read_text())["sources"]
    assert [sources[path]["dropped"] for path in paths] == [
        {"the same prompt again": 1},
        {"the same prompt again": 3},
    ]


def test_a_prompt_that_the_tokenizer_refuses_is_a_bad_row(tmp_path: Path) -> None:
    path = write(tmp_path / "p.jsonl", "w1", [{"role": "user", "content": "w2"}], "w3")
    data = PromptData(path, eval_fraction=0, fuse_fraction=0, max_bad_rows=1)
    set_up(data, tmp_path, template=False)
    assert sorted(texts(data.train_prompts(1))) == ["w1", "w3"]
    written = json.loads((tmp_path / "run" / "data_report.json").read_text())
    assert "line 2 is a conversation" in written["sources"][path]["bad"][0]
