from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from tests.models.tiny import tiny_tokenizer
from tests.moe.rewards import DENSE, IDS, MASK, reward_model, scores, seeded
from tpmm_pl.models.load import switch_off_dropout
from tpmm_pl.models.moe_checkpoint import is_moe_folder, load_moe, save_moe
from tpmm_pl.moe.convert import moe_layers, upcycle
from tpmm_pl.moe.routing import MoESettings, recorded_routing
from tpmm_pl.types import InputError

SETTINGS = MoESettings(5, 4, 2, normalise=False, reinitialise=0.5)

RELOAD = """
import sys, torch
from pathlib import Path
from tpmm_pl.models.moe_checkpoint import load_moe
model = load_moe(Path(sys.argv[1]), dtype=torch.float32)
ids, mask = torch.load(sys.argv[2])
with torch.no_grad():
    torch.save(model(input_ids=ids, attention_mask=mask).logits[:, 0], sys.argv[3])
"""


def mixture(name: str = "llama", settings: MoESettings = SETTINGS) -> PreTrainedModel:
    """An upcycled model with every weight moved."""
    model = reward_model(name)
    upcycle(model, settings, generator=seeded())
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            parameter.add_(torch.randn(parameter.shape, generator=seeded(number)), alpha=0.1)
    return model


def saved(folder: Path, model: PreTrainedModel) -> Path:
    save_moe(model, tiny_tokenizer(), folder / "out")
    return folder / "out"


@pytest.mark.parametrize("name", DENSE)
def test_weights_settings_and_scores_come_back_bit_for_bit(tmp_path: Path, name: str) -> None:
    model = mixture(name)
    back = load_moe(saved(tmp_path, model), dtype=torch.float32)
    assert not back.training
    assert list(back.state_dict()) == list(model.state_dict())
    for path, tensor in model.state_dict().items():
        assert torch.equal(back.state_dict()[path], tensor), path
    assert torch.equal(scores(back), scores(model))
    assert {layer.settings for layer in moe_layers(back).values()} == {SETTINGS}
    noisy = []
    switch_off_dropout(back)
    for either in (model, back):
        with recorded_routing(either.train(), MASK, seeded()):
            noisy.append(scores(either))
    assert torch.equal(*noisy)


def test_a_fresh_process_computes_the_same_scores(tmp_path: Path) -> None:
    model = mixture("gpt2")
    torch.save((IDS, MASK), tmp_path / "inputs")
    arguments = [str(saved(tmp_path, model)), str(tmp_path / "inputs"), str(tmp_path / "scores")]
    subprocess.run([sys.executable, "-c", RELOAD, *arguments], check=True, capture_output=True)
    assert torch.equal(torch.load(tmp_path / "scores"), scores(model))


def test_half_precision_comes_back_with_float32_routers(tmp_path: Path) -> None:
    # no rotary embedding, whose buffer a cast would round and loading would not
    model = mixture("gpt2").bfloat16()
    back = load_moe(saved(tmp_path, model), dtype=torch.bfloat16)
    dtypes = {path: tensor.dtype for path, tensor in model.state_dict().items()}
    assert {path: tensor.dtype for path, tensor in back.state_dict().items()} == dtypes
    assert set(dtypes.values()) == {torch.bfloat16, torch.float32}
    assert torch.equal(scores(back), scores(model))


def test_tied_weights_are_written_once_and_tied_again(tmp_path: Path) -> None:
    model = mixture("t5")
    folder = saved(tmp_path, model)
    tied = json.loads((folder / "moe.json").read_text())["tied"]
    twins = {f"transformer.{part}.embed_tokens.weight" for part in ("encoder", "decoder")}
    assert tied == dict.fromkeys(sorted(twins, reverse=True), "transformer.shared.weight")
    back = load_moe(folder, dtype=torch.float32)
    shared = back.get_parameter("transformer.shared.weight")
    assert all(back.get_parameter(twin) is shared for twin in twins)


def test_there_is_one_shard_a_block_and_an_index_of_all_names(tmp_path: Path) -> None:
    model = mixture()
    folder = saved(tmp_path, model)
    shards = sorted(path.name for path in folder.glob("*.safetensors"))
    assert shards == [f"moe-{n:05d}-of-00003.safetensors" for n in (1, 2, 3)]
    index = json.loads((folder / "moe.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(model.state_dict())
    held: dict[str, str] = {}
    for shard in shards:
        with safe_open(folder / shard, "pt") as opened:
            held |= dict.fromkeys(opened.keys(), shard)
    assert held == index["weight_map"]
    size = sum(t.numel() * t.element_size() for t in model.state_dict().values())
    assert index["metadata"]["total_size"] == size


def test_plain_transformers_refuses_the_folder(tmp_path: Path) -> None:
    folder = saved(tmp_path, mixture())
    assert is_moe_folder(folder)
    with pytest.raises(OSError, match="safetensors"):
        AutoModelForSequenceClassification.from_pretrained(folder)


def test_loading_leaves_the_global_generator_alone(tmp_path: Path) -> None:
    folder = saved(tmp_path, mixture())
    before = torch.get_rng_state()
    load_moe(folder, dtype=torch.float32)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_folder_is_replaced_whole_and_nothing_is_left_beside(tmp_path: Path) -> None:
    folder = saved(tmp_path, mixture())
    (folder / "stale").touch()
    saved(tmp_path, mixture("gpt2"))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert not (folder / "stale").exists()
    assert type(load_moe(folder, dtype=torch.float32)).__name__ == "GPT2ForSequenceClassification"


def test_a_failed_write_leaves_the_old_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = mixture()
    folder = saved(tmp_path, model)

    def full(*_: object, **__: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("tpmm_pl.models.moe_checkpoint.save_file", full)
    with pytest.raises(OSError, match="no space"):
        saved(tmp_path, mixture("gpt2"))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert torch.equal(scores(load_moe(folder, dtype=torch.float32)), scores(model))


def test_dense_models_and_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no mixture of experts; upcycle it first"):
        saved(tmp_path, reward_model("llama"))
    reward_model("llama").save_pretrained(tmp_path / "dense")
    assert not is_moe_folder(tmp_path / "dense")
    with pytest.raises(InputError, match=r"has no moe\.json"):
        load_moe(tmp_path / "dense", dtype=torch.float32)


def test_incomplete_folders_and_other_versions_are_refused(tmp_path: Path) -> None:
    folder = saved(tmp_path, mixture())
    shard = folder / "moe-00002-of-00003.safetensors"
    shard.rename(folder / "elsewhere")
    with pytest.raises(InputError, match="lacks moe-00002-of-00003"):
        load_moe(folder, dtype=torch.float32)
    (folder / "elsewhere").rename(shard)
    index = folder / "moe.safetensors.index.json"
    content = json.loads(index.read_text())
    where = {n: f for n, f in content["weight_map"].items() if f != shard.name}
    index.write_text(json.dumps(content | {"weight_map": where}))
    with pytest.raises(InputError, match=r"lacks \d+ weights, as model\.layers\.0\."):
        load_moe(folder, dtype=torch.float32)
    record = json.loads((folder / "moe.json").read_text())
    (folder / "moe.json").write_text(json.dumps(record | {"version": 2}))
    with pytest.raises(InputError, match="version 2, this program reads 1"):
        load_moe(folder, dtype=torch.float32)
