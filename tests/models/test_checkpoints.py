from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from tests.models.tiny import tiny_gpt2, tiny_llama, tiny_tokenizer
from tpmm_pl.models.adapters import LoraSettings, with_adapters
from tpmm_pl.models.checkpoints import load_checkpoint
from tpmm_pl.models.export import export_model
from tpmm_pl.types import InputError

IDS = torch.arange(6, 30).reshape(3, 8)


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    values: Tensor = model.eval()(IDS).logits
    return values


def adapted(model: PreTrainedModel | None = None, **settings: Any) -> PeftModel:
    policy = with_adapters(
        model or tiny_llama(), LoraSettings(**{"r": 2, **settings}), task_type="CAUSAL_LM"
    )
    assert isinstance(policy, PeftModel)
    return policy


def trained_adapter(folder: Path, **settings: Any) -> PeftModel:
    """An adapter as peft alone makes and writes it."""
    config = LoraConfig(**{"r": 2, "lora_alpha": 32, "target_modules": "all-linear", **settings})
    model = get_peft_model(tiny_llama(), config)
    generator = torch.Generator().manual_seed(5)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(str(folder))
    return model


@pytest.mark.parametrize("kind", ["llama", "tied", "gpt2"])
def test_a_folder_of_another_trainer_is_loaded_bit_for_bit(kind: str, tmp_path: Path) -> None:
    def make(seed: int) -> PreTrainedModel:
        if kind == "gpt2":
            return tiny_gpt2(seed=seed)
        return tiny_llama(seed=seed, tied=kind == "tied")

    policy, other = make(0), make(1)
    other.save_pretrained(tmp_path / "c")
    load_checkpoint(policy, tmp_path / "c")
    assert torch.equal(logits(policy), logits(other))


@pytest.mark.parametrize("settings", [{}, {"use_dora": True}, {"use_rslora": True}])
def test_an_adapter_of_peft_is_loaded_bit_for_bit(settings: dict[str, Any], tmp_path: Path) -> None:
    policy, other = adapted(**settings), trained_adapter(tmp_path / "c", **settings)
    load_checkpoint(policy, tmp_path / "c")
    assert torch.equal(logits(policy), logits(other))
    assert not torch.equal(logits(policy), logits(tiny_llama()))


def test_random_numbers_are_left_alone(tmp_path: Path) -> None:
    tiny_llama(seed=1).save_pretrained(tmp_path / "c")
    policy = tiny_llama()
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    load_checkpoint(policy, tmp_path / "c")
    assert torch.equal(torch.rand(1), expected)


def rewritten(folder: Path, **changes: Tensor | None) -> None:
    file = next(folder.glob("*.safetensors"))
    state = load_file(file) | {n: t for n, t in changes.items() if t is not None}
    kept = {name: tensor for name, tensor in state.items() if changes.get(name, tensor) is not None}
    save_file(kept, file, metadata={"format": "pt"})


NORM = "model.norm.weight"


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({NORM: None}, r"the checkpoint .*c lacks tensor model\.norm\.weight \(1 names differ\)"),
        ({"more": torch.ones(1)}, r"c has an extra tensor more \(1 names differ\); give a folder"),
        ({NORM: torch.ones(3)}, r"cannot load .*c \(.*\); give a folder made by save_pretrained"),
    ],
)
def test_a_folder_with_other_tensors_is_named_with_the_tensor(
    change: dict[str, Any], sentence: str, tmp_path: Path
) -> None:
    tiny_llama(seed=1).save_pretrained(tmp_path / "c")
    rewritten(tmp_path / "c", **change)
    policy = tiny_llama()
    with pytest.raises(InputError, match=sentence):
        load_checkpoint(policy, tmp_path / "c")
    assert torch.equal(logits(policy), logits(tiny_llama())), "the policy is as it was"


def test_a_model_of_another_size_or_kind_is_refused(tmp_path: Path) -> None:
    grown = tiny_llama(seed=1)
    grown.resize_token_embeddings(40, mean_resizing=False)
    grown.save_pretrained(tmp_path / "grown")
    sentence = r"not of the policy's model: grown: tensor .* has shape \(40, 16\), not \(32, 16\)"
    with pytest.raises(InputError, match=sentence):
        load_checkpoint(tiny_llama(), tmp_path / "grown")
    tiny_gpt2().save_pretrained(tmp_path / "gpt2")
    with pytest.raises(InputError, match=r"gpt2 is of the model type gpt2, the policy is llama;"):
        load_checkpoint(tiny_llama(), tmp_path / "gpt2")
    with pytest.raises(InputError, match=r"grown is for a Hugging Face model, not Linear"):
        load_checkpoint(nn.Linear(1, 1), tmp_path / "grown")


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"lora_alpha": 8}, r"the adapter .*c has lora_alpha 8, the policy's 32; set lora as"),
        ({"use_dora": True}, r"the adapter .*c has use_dora True, the policy's False; set lora"),
        ({"init_lora_weights": "pissa"}, r"c began by pissa, which changes the model; .* merged"),
        ({"r": 3}, r"not of the policy's model: c: tensor .*lora_A.weight has shape \(3, 16\)"),
        ({"target_modules": ["q_proj"]}, r"c lacks tensor .*down_proj\.lora_A\.weight"),
    ],
)
def test_an_adapter_of_other_settings_is_refused(
    settings: dict[str, Any], sentence: str, tmp_path: Path
) -> None:
    trained_adapter(tmp_path / "c", **settings)
    with pytest.raises(InputError, match=sentence):
        load_checkpoint(adapted(), tmp_path / "c")


def test_models_and_adapters_are_not_taken_for_each_other(tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path / "model")
    trained_adapter(tmp_path / "adapter")
    with pytest.raises(InputError, match=r"model has no adapter_model.safetensors, but the policy"):
        load_checkpoint(adapted(), tmp_path / "model")
    with pytest.raises(InputError, match=r"adapter is an adapter, but the policy trains all"):
        load_checkpoint(tiny_llama(), tmp_path / "adapter")


def test_a_folder_that_is_broken_or_gone_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no checkpoint folder .*gone; check the path"):
        load_checkpoint(tiny_llama(), tmp_path / "gone")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"cannot load .*empty \(.*config\.json.*\); give"):
        load_checkpoint(tiny_llama(), tmp_path / "empty")
    trained_adapter(tmp_path / "cut")
    file = tmp_path / "cut" / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(InputError, match=r"cannot load .*cut \(.+\); give a folder"):
        load_checkpoint(adapted(), tmp_path / "cut")
    (tmp_path / "cut" / "adapter_config.json").write_text("{")
    with pytest.raises(InputError, match=r"cannot load .*cut \(.+\); give a folder"):
        load_checkpoint(adapted(), tmp_path / "cut")


def test_a_checkpoint_in_another_dtype_is_cast(tmp_path: Path) -> None:
    export_model(tiny_llama(seed=1).bfloat16(), tiny_tokenizer(), None, tmp_path / "c")
    policy = tiny_llama()
    load_checkpoint(policy, tmp_path / "c")
    assert policy.dtype == torch.float32
    expected = dict(tiny_llama(seed=1).named_parameters())
    for name, parameter in policy.named_parameters():
        assert torch.equal(parameter, expected[name].bfloat16().float()), name
