from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel

from tests.models.tiny import tiny_gpt2, tiny_llama, tiny_tokenizer
from tpmm_pl.models.export import export_model

IDS = torch.arange(2, 14).reshape(2, 6)

RELOAD = """
import sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
with torch.no_grad():
    torch.save(model(torch.arange(2, 14).reshape(2, 6)).logits, sys.argv[2])
"""


@torch.no_grad()
def logits(model: PreTrainedModel | PeftModel) -> Tensor:
    values: Tensor = model.eval()(IDS, attention_mask=torch.ones_like(IDS)).logits
    return values


def test_a_fresh_process_computes_what_the_exported_state_does(tmp_path: Path) -> None:
    model, other = tiny_llama(seed=0), tiny_llama(seed=1)
    export_model(model, tiny_tokenizer(), other.state_dict(), tmp_path / "out")
    command = [sys.executable, "-c", RELOAD, str(tmp_path / "out"), str(tmp_path / "logits")]
    subprocess.run(command, check=True, capture_output=True)
    assert torch.equal(torch.load(tmp_path / "logits"), logits(other))
    assert torch.equal(logits(model), logits(tiny_llama(seed=0))), "the model itself is as it was"


def test_without_a_state_the_model_is_written(tmp_path: Path) -> None:
    model = tiny_gpt2()
    export_model(model, tiny_tokenizer(), None, tmp_path / "out")
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(logits(back), logits(model))


@pytest.mark.parametrize("names", ["both", "source"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_tied_weights_are_written_once(tmp_path: Path, kind: str, names: str) -> None:
    make = tiny_gpt2 if kind == "gpt2" else lambda seed=0: tiny_llama(seed=seed, tied=True)
    other = make(seed=1)
    state = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    if names == "source":
        del state["lm_head.weight"]
    export_model(make(), tiny_tokenizer(), state, tmp_path / "out")
    assert "lm_head.weight" not in load_file(tmp_path / "out" / "model.safetensors")
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(logits(back), logits(other))


def test_weights_take_the_models_dtype(tmp_path: Path) -> None:
    state = tiny_llama(seed=1).state_dict()
    export_model(tiny_llama().bfloat16(), tiny_tokenizer(), state, tmp_path / "out")
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert back.dtype == torch.bfloat16
    for name, weight in back.state_dict().items():
        assert torch.equal(weight, state[name].bfloat16()), name


def test_the_folder_is_complete(tmp_path: Path) -> None:
    export_model(tiny_llama(), tiny_tokenizer(), None, tmp_path / "deep" / "out")
    names = {path.name for path in (tmp_path / "deep" / "out").iterdir()}
    assert {"config.json", "generation_config.json", "model.safetensors"} <= names
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["out"]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "deep" / "out")
    assert tokenizer("w0 <eos>")["input_ids"] == [6, 1]
    assert tokenizer.chat_template == tiny_tokenizer().chat_template


def test_an_older_folder_is_replaced_as_a_whole(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "stale.txt").write_text("old")
    export_model(tiny_llama(), tiny_tokenizer(), None, tmp_path / "out")
    assert not (tmp_path / "out" / "stale.txt").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_failed_export_leaves_the_older_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "kept.txt").write_text("old")
    tokenizer = tiny_tokenizer()

    def fail(_: Path) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(tokenizer, "save_pretrained", fail)
    with pytest.raises(OSError, match="disk full"):
        export_model(tiny_llama(), tokenizer, None, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["kept.txt"]


def test_a_state_of_another_model_is_refused(tmp_path: Path) -> None:
    model, state = tiny_llama(), tiny_llama().state_dict()
    norm = "model.norm.weight"
    with pytest.raises(ValueError, match=r"1 of the model's weights are missing, as model\.norm"):
        export_model(
            model, tiny_tokenizer(), {k: v for k, v in state.items() if k != norm}, tmp_path / "out"
        )
    with pytest.raises(ValueError, match=r"1 weights are not the model's, as extra"):
        export_model(model, tiny_tokenizer(), {**state, "extra": state[norm]}, tmp_path / "out")
    with pytest.raises(ValueError, match=r"norm.weight has the shape \(3,\), the model's \(16,\)"):
        export_model(model, tiny_tokenizer(), {**state, norm: torch.ones(3)}, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("active", ["default", "merge"])
def test_of_adapters_the_active_one_is_written(tmp_path: Path, active: str) -> None:
    config = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    policy = get_peft_model(tiny_llama(), config)
    policy.add_adapter("merge", config)
    policy.set_adapter(active)
    export_model(policy, tiny_tokenizer(), None, tmp_path / "out")
    back = PeftModel.from_pretrained(tiny_llama(), tmp_path / "out")
    assert torch.equal(logits(back), logits(policy))
    assert not torch.equal(logits(back), logits(tiny_llama()))
    assert not [path for path in (tmp_path / "out").iterdir() if path.is_dir()]


def test_a_state_for_an_adapter_is_refused(tmp_path: Path) -> None:
    policy = get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules="all-linear"))
    with pytest.raises(ValueError, match="an adapter is exported as it is; put the state into"):
        export_model(policy, tiny_tokenizer(), {}, tmp_path / "out")


def test_sampling_settings_that_are_not_of_a_sampling_kind_are_made_valid(tmp_path: Path) -> None:
    for model in (
        tiny_llama(),
        get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules=["q_proj"])),
    ):
        settings: Any = model.generation_config
        settings.temperature, settings.top_p = 0.6, 0.9
        with pytest.raises(ValueError, match="do_sample"):
            settings.save_pretrained(tmp_path / "refused")
        export_model(model, tiny_tokenizer(), None, tmp_path / "out")
        back = GenerationConfig.from_pretrained(tmp_path / "out")
        assert (back.do_sample, back.temperature, back.top_p) == (True, 0.6, 0.9)
        assert back.eos_token_id == model.config.eos_token_id
        assert settings.do_sample is not True, "the model's own are as they were"


def test_notes_take_the_place_of_what_a_library_writes(tmp_path: Path) -> None:
    policy = get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules=["q_proj"]))
    for model in (tiny_llama(), policy):
        export_model(model, tiny_tokenizer(), None, tmp_path / "out", {"README.md": "é card"})
        assert (tmp_path / "out" / "README.md").read_text(encoding="utf-8") == "é card"
