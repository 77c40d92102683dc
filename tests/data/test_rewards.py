from __future__ import annotations

import json
import re
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from tests.models.tiny import EOS, WORDS, tiny_reward_model, tiny_tokenizer
from tpmm_pl.data.packing import pad_tree
from tpmm_pl.data.rewards import RewardData, evaluation_loaders, read_reward_pairs
from tpmm_pl.models.export import export_model
from tpmm_pl.models.reward import PretrainedReward
from tpmm_pl.modules.reward import RewardModule
from tpmm_pl.types import InputError, Pair


def row(index: int, **changes: object) -> dict[str, object]:
    words = {"prompt": WORDS[index], "chosen": WORDS[index + 1], "rejected": WORDS[index + 2]}
    return {**words, **changes}


def write(path: Path, *rows: dict[str, object]) -> Path:
    path.write_text("\n".join(json.dumps(one) for one in rows))
    return path


class Seen(Callback):
    """Keeps the first token of every training prompt, by epoch."""

    def __init__(self) -> None:
        self.epochs: list[list[int]] = []

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.epochs.append([])

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.epochs[-1] += prompts([batch])


@pytest.fixture(scope="module")
def module(tmp_path_factory: pytest.TempPathFactory) -> RewardModule:
    folder = tmp_path_factory.mktemp("rm") / "rm"
    export_model(tiny_reward_model(), tiny_tokenizer(template=False), None, folder)
    return RewardModule(PretrainedReward(str(folder)), partial(torch.optim.SGD, lr=0.1))


def trainer(**settings: Any) -> Trainer:
    return Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        reload_dataloaders_every_n_epochs=1,
        **settings,
    )


def set_up(data: RewardData, module: RewardModule, root: Path) -> RewardData:
    attached: Any = trainer(max_epochs=1, default_root_dir=root / "run")
    data.cache_dir = root / "cache"
    attached.strategy.connect(module)
    attached.datamodule = data
    data.trainer = attached
    data.setup("fit")
    return data


def prompts(steps: Any) -> list[int]:
    """First tokens of the prompts of all pairs."""
    return [
        first
        for batch in chain(*steps)
        for first in pad_tree(batch.tree)[0][: len(batch.weight), 0].tolist()
    ]


def test_every_epoch_shows_every_training_pair_once_in_an_order_of_its_own(
    module: RewardModule, tmp_path: Path
) -> None:
    train = write(tmp_path / "train.jsonl", *(row(index) for index in range(20)))
    data, seen = RewardData(train, eval_fraction=0.2, batch_size=4), Seen()
    data.cache_dir = tmp_path / "cache"
    fitted = trainer(max_epochs=2, callbacks=[seen], default_root_dir=tmp_path)
    fitted.fit(module, datamodule=data)
    assert data.domains == ["in_domain"]
    held_out = prompts(data.val_dataloader()[0])
    assert len(held_out) == 4
    first, second = seen.epochs
    assert sorted(first) == sorted(second) == sorted(set(range(6, 26)) - set(held_out))
    assert first != second
    assert "eval/accuracy/in_domain" in fitted.callback_metrics


def test_files_of_held_out_pairs_come_by_domain_in_their_order(
    module: RewardModule, tmp_path: Path
) -> None:
    train = write(tmp_path / "train.jsonl", *(row(index) for index in range(4)))
    near = write(tmp_path / "near.jsonl", *(row(index) for index in range(10, 15)))
    far = write(tmp_path / "far.jsonl", row(20), row(21))
    data = RewardData(train, {"near": near, "out_of_domain": far}, batch_size=2, max_eval_pairs=3)
    set_up(data, module, tmp_path)
    assert data.domains == ["near", "out_of_domain"]
    first, second = data.val_dataloader()
    assert prompts(first) == [16, 17, 18]
    assert prompts(second) == [26, 27]
    assert len(prompts(data.train_dataloader())) == 4


def test_a_margin_reaches_the_batch(module: RewardModule, tmp_path: Path) -> None:
    train = write(tmp_path / "d.jsonl", row(0, margin=0.5), row(1), row(2, margin=-1))
    data = set_up(RewardData(train, eval_fraction=0.0, batch_size=3), module, tmp_path)
    ((batch,),) = data.train_dataloader()
    found = dict(zip(prompts([[batch]]), batch.margin.tolist(), strict=True))
    assert found == {6: 0.5, 7: 0.0, 8: -1.0}
    assert batch.margin.dtype == torch.float32
    assert data.domains == []
    assert data.val_dataloader() == []


def test_rows_of_equal_answers_are_dropped_and_counted(
    module: RewardModule, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train = write(tmp_path / "d.jsonl", row(0), row(1, chosen="w9", rejected="w9"), row(2))
    data = set_up(RewardData(train, eval_fraction=0.0, batch_size=2), module, tmp_path)
    assert sorted(prompts(data.train_dataloader())) == [6, 8]
    said = capsys.readouterr()
    assert re.search(r"d\.jsonl +dropped: chosen and rejected identical +1\n", said.err)
    assert "one example; the tokens in brackets are trained on" in said.err
    assert not said.out
    written = json.loads((tmp_path / "run" / "data_report.json").read_text())
    assert written["sources"][str(train)]["read"] == 3


@pytest.mark.parametrize(
    ("rows", "settings", "sentence"),
    [
        ([row(0), row(1, rejected=" ")], {}, r"d\.jsonl, line 2: rejected is empty; fill it or"),
        ([row(0), row(1, chosen="")], {}, r"d\.jsonl, line 2: chosen is empty; fill it or delete"),
        (
            [row(0), row(1, margin="big")],
            {},
            r"d\.jsonl, line 2: margin is 'big'; give a finite number",
        ),
        (
            [row(index) for index in range(5)],
            {"eval_fraction": 0.4, "batch_size": 4},
            r"d\.jsonl leaves 3 training pairs, fewer than a batch of 4; give more pairs or",
        ),
        (
            [row(0), row(1)],
            {"evaluation": {"in_domain": "e.jsonl"}},
            r"1 prompts are in the training data and in the held-out data, among them 'w1'",
        ),
    ],
)
def test_what_is_wrong_with_the_data_is_named(
    rows: list[dict[str, object]],
    settings: dict[str, Any],
    sentence: str,
    module: RewardModule,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "e.jsonl", row(1), row(9))
    data = RewardData(
        write(tmp_path / "d.jsonl", *rows), **{"eval_fraction": 0.0, "batch_size": 1, **settings}
    )
    with pytest.raises(InputError, match=sentence):
        set_up(data, module, tmp_path)


@pytest.mark.parametrize("setting", ["batch_size", "token_budget"])
def test_a_batch_of_nothing_is_refused_at_once(setting: str, tmp_path: Path) -> None:
    settings: dict[str, Any] = {setting: 0}
    with pytest.raises(InputError, match=f"{setting} is 0; it must be at least 1"):
        RewardData(tmp_path / "d.jsonl", **settings)


def test_a_file_is_read_for_a_tokenizer_with_half_the_length_for_the_prompt(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path / "d.jsonl", row(0, prompt="w0 w1 w2 w3", chosen="w4 w5 w6"))
    (pair,) = read_reward_pairs(path, tiny_tokenizer(template=False), max_length=4)
    assert pair.prompt_ids == (8, 9)
    assert pair.chosen_ids == (10, 11)
    assert pair.rejected_ids == (8, EOS)
    assert re.search(r"d\.jsonl +cut: prompts cut off +1\n", capsys.readouterr().err)


def test_evaluation_leaves_no_pair_out() -> None:
    pairs = [Pair(str(i), "", "", "", (i,), (1,), (2,)) for i in range(3, 8)]
    (loader,) = evaluation_loaders({"in_domain": pairs}, batch_size=2)
    assert [[len(batch.weight) for batch in step] for step in loader] == [[2], [2], [1]]
    assert prompts(loader) == [3, 4, 5, 6, 7]
    (cut,) = evaluation_loaders({"in_domain": pairs}, batch_size=4, token_budget=8)
    assert [[len(batch.weight) for batch in step] for step in cut] == [[2, 2], [1]]
    assert prompts(cut) == [3, 4, 5, 6, 7]


def test_a_token_budget_cuts_the_batches_of_training_and_evaluation(
    module: RewardModule, tmp_path: Path
) -> None:
    train = write(tmp_path / "train.jsonl", *(row(index) for index in range(4)))
    held_out = write(tmp_path / "held_out.jsonl", row(20), row(21))
    # a pair has 1 token of a prompt and 2 and 2 of answers, their ends included
    for token_budget, cut in ((5, [1, 1, 1, 1]), (10, [2, 2]), (15, [3, 1]), (20, [4])):
        data = RewardData(train, {"far": held_out}, batch_size=4, token_budget=token_budget)
        set_up(data, module, tmp_path)
        (step,) = data.train_dataloader()
        assert [len(batch.weight) for batch in step] == cut
        assert sorted(prompts([step])) == [6, 7, 8, 9]
        ((evaluated,),) = data.val_dataloader()
        assert len(evaluated) == (2 if token_budget == 5 else 1)
        assert prompts([evaluated]) == [26, 27]


def test_a_validation_behind_the_fit_reads_and_tells_nothing_again(
    module: RewardModule, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path / "t.jsonl", *(row(index) for index in range(20)))
    data = set_up(RewardData(str(path)), module, tmp_path)
    pairs = data.train_pairs
    assert capsys.readouterr().err.count("one example") == 1
    data.setup("validate")
    assert data.train_pairs is pairs
    assert not capsys.readouterr().err
