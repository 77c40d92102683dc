"""``tpmm upcycle`` and ``tpmm consolidate`` from the command line, on tiny models."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification, OPTConfig, OPTForSequenceClassification

from tests.models.tiny import EOS, PAD, tiny_reward_model, tiny_tokenizer
from tpmm_pl.cli import main
from tpmm_pl.data.batching import collate
from tpmm_pl.data.rewards import read_reward_pairs
from tpmm_pl.models.load import load_reward_model
from tpmm_pl.models.moe_checkpoint import save_moe
from tpmm_pl.modules.consolidation import mean_gates
from tpmm_pl.moe.convert import consolidate, moe_layers, shared_coefficients

FEW = ["--experts", "4", "--active", "3"]


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tiny_reward_model(), tmp_path_factory.mktemp("dense"))


@pytest.fixture(scope="module")
def experts(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A mixture whose experts have moved apart."""
    out = tmp_path_factory.mktemp("made") / "experts"
    assert run("upcycle", dense, "--out", out, *FEW) == 0
    model, tokenizer = load_reward_model(str(out))
    generator = torch.Generator().manual_seed(0)
    for layer in moe_layers(model).values():
        for parameter in layer.experts.parameters():
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    save_moe(model, tokenizer, out)
    return out


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    file = tmp_path / "pairs.jsonl"
    rows = [
        {"prompt": f"w{i} w1 ", "chosen": f"w2 w{i % 7}", "rejected": f"w3 w{i % 5} w4"}
        for i in range(20)
    ]
    file.write_text("\n".join(json.dumps(row) for row in rows))
    return file


def saved(model: Any, folder: Path) -> Path:
    model.save_pretrained(folder)
    tiny_tokenizer(template=False).save_pretrained(folder)
    return folder


def run(*arguments: object) -> int:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(sys, "argv", ["tpmm", *map(str, arguments)])
        try:
            main()
        except SystemExit as ended:
            return int(ended.code or 0)
        return 0


def assert_merged(experts: Path, rows: list[list[float]], out: Path) -> None:
    """What was written is the merge of the experts by the coefficients that were told."""
    model, _ = load_reward_model(str(experts))
    consolidate(model, torch.tensor(rows))
    found = AutoModelForSequenceClassification.from_pretrained(out).state_dict()
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(found[name], tensor, atol=1e-6, rtol=0)


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert run(*arguments) == 2
    return capsys.readouterr().err.strip()


def test_upcycling_and_merging_at_once_gives_the_dense_model_back(
    dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("upcycle", dense, "--out", tmp_path / "experts", *FEW) == 0
    assert "2 layers of 4 experts, 3 active" in capsys.readouterr().out
    assert run("consolidate", tmp_path / "experts", "--out", tmp_path / "again", "--json") == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["coefficients"] == "uniform"
    assert printed["max_difference"] <= 1e-5
    expected = AutoModelForSequenceClassification.from_pretrained(dense).state_dict()
    found = AutoModelForSequenceClassification.from_pretrained(tmp_path / "again").state_dict()
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, atol=1e-6, rtol=0)


def test_coefficients_are_learned_where_there_are_pairs(
    experts: Path, pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "merged"
    assert run("consolidate", experts, "--out", out, "--pairs", pairs, "--json") == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["coefficients"] == "learned"
    assert printed["loss"] < printed["loss_start"]
    assert printed["max_difference"] <= 1e-5
    assert [row[0] for row in printed["rows"]] == pytest.approx([0.5, 0.5])
    assert [sum(row) for row in printed["rows"]] == pytest.approx([1.0, 1.0])
    assert_merged(experts, printed["rows"], out)


def test_gates_measured_on_pairs_are_coefficients_without_learning(
    experts: Path, pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "merged"
    flags = ["--coefficients", "routing", "--shared-coefficient", "0.25", "--json"]
    assert run("consolidate", experts, "--out", out, "--pairs", pairs, *flags) == 0
    printed = json.loads(capsys.readouterr().out)
    model, tokenizer = load_reward_model(str(experts))
    batch = collate(read_reward_pairs(pairs, tokenizer, max_length=64))
    expected = shared_coefficients(mean_gates(model, [batch]).float(), 1, 0.25)
    torch.testing.assert_close(torch.tensor(printed["rows"]), expected, atol=1e-5, rtol=0)
    assert (expected[:, 1:] - 0.25).abs().max() > 1e-3
    assert_merged(experts, printed["rows"], out)


def test_more_active_experts_than_there_are_is_refused(
    dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--experts", "4", "--active", "5"]
    sentence = refused(capsys, "upcycle", dense, "--out", tmp_path / "out", *flags)
    assert "active is 5; with 1 shared of 4 experts it must be in 2 .. 4" in sentence
    assert not (tmp_path / "out").exists()


def test_a_mixture_is_not_upcycled_again(
    experts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sentence = refused(capsys, "upcycle", experts, "--out", tmp_path / "out")
    assert "is a mixture of experts already; give the dense model" in sentence
    assert not (tmp_path / "out").exists()


def test_a_dense_folder_is_not_consolidated(
    dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sentence = refused(capsys, "consolidate", dense, "--out", tmp_path / "out")
    assert "is no mixture of experts made here (it has no moe.json)" in sentence


def test_learning_needs_pairs(
    experts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--coefficients", "learned"]
    sentence = refused(capsys, "consolidate", experts, "--out", tmp_path / "out", *flags)
    assert "--coefficients learned needs pairs to look at; give --pairs FILE" in sentence


def test_experts_whose_scores_are_no_numbers_are_refused(
    experts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, tokenizer = load_reward_model(str(experts))
    model.get_parameter("score.weight").data[0, 0] = torch.nan
    save_moe(model, tokenizer, tmp_path / "broken")
    sentence = refused(capsys, "consolidate", tmp_path / "broken", "--out", tmp_path / "out")
    assert "scores are not finite; check the experts" in sentence
    assert not (tmp_path / "out").exists()


def test_a_folder_in_use_is_kept_unless_asked(
    dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("kept")
    sentence = refused(capsys, "upcycle", dense, "--out", tmp_path / "out", *FEW)
    assert "exists; choose another --out, or replace it with --overwrite" in sentence
    assert (tmp_path / "out" / "mine.txt").exists()
    assert run("upcycle", dense, "--out", tmp_path / "out", "--overwrite", *FEW) == 0
    assert not (tmp_path / "out" / "mine.txt").exists()


def test_a_classifier_of_two_labels_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = saved(tiny_reward_model(labels=2), tmp_path / "two")
    sentence = refused(capsys, "upcycle", folder, "--out", tmp_path / "out")
    assert "2 outputs" in sentence or "num_labels" in sentence


def test_a_model_with_inline_layers_is_refused_by_its_modules(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = OPTConfig(
        vocab_size=32, hidden_size=16, word_embed_proj_dim=16, ffn_dim=32, num_hidden_layers=2,
        num_attention_heads=2, pad_token_id=PAD, eos_token_id=EOS, bos_token_id=EOS,
    )  # fmt: skip
    config.num_labels = 1
    folder = saved(OPTForSequenceClassification(config), tmp_path / "opt")
    sentence = refused(capsys, "upcycle", folder, "--out", tmp_path / "out")
    assert "no feed-forward layer found" in sentence
    assert "fc1: Linear" in sentence
    assert not (tmp_path / "out").exists()


def test_numbers_below_one_and_places_that_cannot_be_written_are_refused(
    experts: Path, pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["consolidate", experts, "--pairs", pairs, "--out"]
    sentence = refused(capsys, *given, tmp_path / "out", "--batch_size", "0")
    assert "--steps 50 and --batch_size 0 must be at least 1" in sentence
    sentence = refused(capsys, *given, tmp_path / "out", "--max_length", "1")
    assert "max_length is 1; it must be at least 2 tokens" in sentence
    alike = tmp_path / "alike.jsonl"
    alike.write_text(json.dumps({"prompt": "w1", "chosen": "w2 w3", "rejected": "w2 w4"}))
    cut = ["consolidate", experts, "--pairs", alike, "--out", tmp_path / "out"]
    sentence = refused(capsys, *cut, "--max_length", "2")
    assert "leaves no pair at --max_length 2; give others" in sentence
    assert "cannot be made" in refused(capsys, *given, pairs / "out")
    assert "cannot be made" in refused(capsys, *given, pairs, "--overwrite")


def test_coefficients_that_change_nothing_are_told_to_say_little(
    dense: Path, pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("upcycle", dense, "--out", tmp_path / "copies", *FEW) == 0
    given = ["--pairs", pairs, "--out", tmp_path / "out"]
    assert run("consolidate", tmp_path / "copies", *given) == 0
    assert "the loss hardly fell; these coefficients say little" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ('{"prompt": "w1", "chosen": "w2", "rejected": "w2"}', "identical"),
        (
            '{"prompt": "w1", "chosen": "", "rejected": "w2"}',
            "pairs.jsonl, line 1: chosen is empty",
        ),
        ('{"prompt": "w1", "chosen"', "pairs.jsonl, line 1"),
    ],
)
def test_pairs_that_cannot_be_used_are_told_by_their_line(
    experts: Path, tmp_path: Path, row: str, reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "pairs.jsonl").write_text(row)
    flags = ["--pairs", tmp_path / "pairs.jsonl"]
    sentence = refused(capsys, "consolidate", experts, "--out", tmp_path / "out", *flags)
    assert reason in sentence
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", ["upcycle", "consolidate"])
def test_help_has_the_options_and_what_they_do(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(command, "--help") == 0
    printed = capsys.readouterr().out
    assert "--out" in printed
    assert "print one JSON object and nothing else" in printed
