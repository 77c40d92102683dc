"""``tpmm merge`` says in one sentence what does not go together."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from tests.commands.saved_models import save
from tests.commands.test_experts import refused
from tests.models.tiny import tiny_gpt2, tiny_llama, tiny_reward_model, tiny_tokenizer
from tests.models.trajectories import adapted


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("models")
    return [save(tiny_llama(seed=seed), root / f"m{seed}") for seed in range(3)]


def other_words() -> PreTrainedTokenizerFast:
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["w99"])
    return tokenizer


def configured(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        save(tiny_llama(seed=1), folder)
        file = folder / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))

    return change


def cut_off(folder: Path) -> None:
    save(tiny_llama(seed=1), folder)
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:-10])


def incomplete(folder: Path) -> None:
    save(tiny_llama(seed=1), folder, max_shard_size="5KB")
    next(folder.glob("model-00002*")).unlink()


def hostile(folder: Path) -> None:
    save(tiny_llama(seed=1), folder)
    (folder / "model.safetensors").unlink()
    # what it would call is no weight
    torch.save({"lm_head.weight": subprocess.Popen}, folder / "pytorch_model.bin")


def lying(folder: Path) -> None:
    save(tiny_llama(seed=1), folder, max_shard_size="5KB")
    file = folder / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    index["weight_map"]["model.norm.weight"] = "../../model.safetensors"
    file.write_text(json.dumps(index))


def taught(folder: Path) -> None:
    save(tiny_llama(seed=1), folder)
    other_words().save_pretrained(folder)


def wider(folder: Path) -> None:
    model = tiny_llama(seed=1)
    model.resize_token_embeddings(40)
    save(model, folder)


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda f: save(tiny_gpt2(), f), "odd is a GPT2LMHeadModel"),
        (lambda f: save(tiny_reward_model(), f), "odd is a LlamaForSequenceClassification"),
        (wider, "shape (40, 16), not (32, 16)"),
        (taught, "token 'w99' is 32, not absent (1 tokens differ)"),
        (configured(num_attention_heads=4, head_dim=8), "has num_attention_heads 4"),
        (configured(rms_norm_eps=1e-5), "has rms_norm_eps 1e-05"),
        (cut_off, "cannot load"),
        (incomplete, "cannot load"),
        (hostile, "save the model anew, as safetensors"),
        (lying, "which is in another folder; restore it"),
        (lambda f: adapted().save_pretrained(f), "is an adapter, whose factors have no average"),
        (lambda f: tiny_tokenizer().save_pretrained(f), "cannot load"),
        (lambda f: f.joinpath("moe.json").write_text("{}"), "is a mixture of experts"),
        (lambda f: tiny_llama().config.save_pretrained(f), "has neither model.safetensors nor"),
    ],
)  # fmt: skip
def test_what_does_not_go_together_is_named(
    make: Callable[[Path], Any],
    sentence: str,
    models: list[Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "odd").mkdir()
    make(tmp_path / "odd")
    capsys.readouterr()  # progress bars of transformers
    said = refused(capsys, "merge", models[0], tmp_path / "odd", "--out", tmp_path / "out")
    assert sentence in said
    assert "odd" in said
    assert said.count("\n") == 0
    assert not (tmp_path / "out").exists()
    base = ["--method", "ties", "--base", tmp_path / "odd"]
    assert sentence in refused(capsys, "merge", *models, *base, "--out", tmp_path / "out")


def test_quantised_weights_are_refused(
    models: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    configured(quantization_config={"quant_method": "fp8"})(tmp_path / "q")
    sentence = refused(capsys, "merge", tmp_path / "q", models[0], "--out", tmp_path / "out")
    assert "q is quantised; give the model in bfloat16 or wider" in sentence
    sentence = refused(capsys, "merge", models[0], tmp_path / "q", "--out", tmp_path / "out")
    assert "q is quantised; give the model in bfloat16 or wider" in sentence


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--weights", "0.5,0.5"], "2 numbers, [0.5, 0.5], for 3 models, m0, m1, m2; give one"),
        (["--weights", "a,b,c"], "--weights is 'a,b,c'; give numbers as 0.2,0.3,0.5"),
        (["--weights", "nan,1,1"], "--weights has 3 numbers, [nan, 1.0, 1.0]"),
        (["--weights=1,-1,0", "--normalize"], "sum to 0; leave --normalize out"),
        (["--method", "slerp"], "slerp merges two models, not 3"),
        (["--method", "slerp", "--weights", "1,1,1"], "--weights goes with linear and ties"),
        (["--method", "ema", "--alpha", "1.5"], "alpha is 1.5; it must be in [0, 1]"),
        (["--method", "ties", "--density", "0"], "--density is 0.0; it must be above 0"),
        (["--method", "learned"], "give --pairs FILE"),
        (["--base", "m"], "--base goes with ties and dare, not linear"),
        (["--rounds", "0,1"], "is none; leave it out"),
    ],
)
def test_a_mistake_is_one_sentence(
    flags: list[str],
    sentence: str,
    models: list[Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert sentence in refused(capsys, "merge", *models, "--out", tmp_path / "out", *flags)
    assert not (tmp_path / "out").exists()


def test_one_model_is_no_merge(
    models: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sentence = refused(capsys, "merge", models[0], "--out", tmp_path / "out")
    assert "alone is no merge; give two models or more" in sentence
