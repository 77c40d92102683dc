from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor

from tests.callbacks.letters_run import context_of, snapshots
from tests.models.tiny import tiny_llama, tiny_tokenizer
from tpmm_pl.callbacks import (
    ModelExport,
    ReferenceMerge,
    RoundContext,
    TrajectorySnapshot,
    finish_round,
    model_export,
)
from tpmm_pl.callbacks.model_export import best_round
from tpmm_pl.losses import preference_loss
from tpmm_pl.merging import linear_merge
from tpmm_pl.models.adapters import LoraSettings
from tpmm_pl.models.export import export_model
from tpmm_pl.models.load import PretrainedPolicy
from tpmm_pl.models.weights import materialise
from tpmm_pl.toy.start import LettersPolicy
from tpmm_pl.trajectory import Record
from tpmm_pl.types import InputError, Recipe

KL = "kl/policy_sft/in_domain"

RELOAD = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
loaded = {}
for name in ("last", "merged", "best"):
    model = AutoModelForCausalLM.from_pretrained(f"{sys.argv[1]}/{name}")
    loaded[name] = {key: weight.clone() for key, weight in model.state_dict().items()}
    AutoTokenizer.from_pretrained(f"{sys.argv[1]}/{name}")
torch.save(loaded, sys.argv[2])
"""


def test_a_fresh_process_loads_the_folders_as_their_recipes_merge(
    start: LettersPolicy, tmp_path: Path
) -> None:
    context = snapshots(tmp_path, start, 2)
    context.final = True
    for index, kl in enumerate((0.0, 4.0, 6.0)):
        context.store.update(index, metrics={KL: kl})
    reference = ReferenceMerge("uniform", ship="merge")
    finish_round([reference, ModelExport(best_kl=5.0)], context)
    command = [sys.executable, "-c", RELOAD, str(tmp_path / "export"), str(tmp_path / "loaded")]
    subprocess.run(command, check=True, capture_output=True)
    loaded = torch.load(tmp_path / "loaded")
    states = [context.store.source(index) for index in range(3)]
    expected = {
        "last": states[2],
        "best": states[1],
        "merged": linear_merge(states, torch.full((3,), 1 / 3, dtype=torch.float64)),
    }
    for name, state in expected.items():
        for key, weight in state.items():
            assert torch.equal(loaded[name][key], weight), (name, key)


def perturbed(root: Path, count: int, lora: LoraSettings | None) -> RoundContext:
    """Write the start and ``count`` perturbed policies; return the last one's context."""
    export_model(tiny_llama(), tiny_tokenizer(), None, root / "model")
    source = PretrainedPolicy(str(root / "model"), lora=lora)
    loss = preference_loss({"sigmoid": 1.0, "sft": 0.1})
    receiver = SimpleNamespace(policy_source=source, loss=loss, epochs_per_round=1)
    context = context_of(root, source, receiver=receiver)
    generator = torch.Generator().manual_seed(0)
    for index in range(count + 1):
        context = replace(context, round_index=index, final=index == count)
        context.data.tokenizer = tiny_tokenizer()
        finish_round([TrajectorySnapshot()], context)
        for parameter in context.policy.parameters():
            if parameter.requires_grad and index < count:
                parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    return context


def adapters(root: Path, count: int, **settings: Any) -> RoundContext:
    return perturbed(root, count, LoraSettings(**{"r": 2, "alpha": 4, **settings}))


def product_sum(context: RoundContext, recipe: Recipe) -> dict[str, Tensor]:
    """The weighted sum of B A over a recipe's snapshots, by layer, scaled by alpha / r."""
    sums: dict[str, Tensor] = {}
    for index, weight in zip(recipe.snapshots, recipe.coefficients[0], strict=True):
        source = context.store.source(index)
        for name in (name for name in source if "lora_A" in name):
            product = source[name.replace("lora_A", "lora_B")].double() @ source[name].double()
            layer = name.removeprefix("base_model.model.").partition(".lora_A")[0]
            sums[layer] = sums.get(layer, torch.zeros(())) + weight * product * 4 / 2
    return sums


RELOAD_ADAPTERS = """
import sys, torch
from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer
ids = torch.arange(6, 30).reshape(3, 8)
found = {}
for name in ("last", "merged", "best"):
    folder = f"{sys.argv[1]}/{name}"
    AutoTokenizer.from_pretrained(folder)
    model = AutoPeftModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        logits = model(ids).logits
    merged = model.merge_and_unload()
    found[name] = (logits, {n: p.detach() for n, p in merged.named_parameters()})
torch.save(found, sys.argv[2])
"""


@pytest.mark.parametrize(("rank", "expected"), [("exact", 6), ("policy", 2), (3, 3)])
def test_a_fresh_process_loads_adapters_as_their_recipes_merge(
    rank: Any, expected: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    context = adapters(tmp_path, 2)
    finish_round([ReferenceMerge("uniform"), ModelExport(adapter_rank=rank)], context)
    command = [sys.executable, "-c", RELOAD_ADAPTERS, str(tmp_path / "export"), str(tmp_path / "l")]
    subprocess.run(command, check=True, capture_output=True)
    loaded = torch.load(tmp_path / "l")
    recipes = {
        "last": Recipe("last", (2,)),
        "merged": Recipe("uniform", (0, 1, 2), ((1 / 3,) * 3,)),
    }
    base = tiny_llama()
    lost = total = 0.0
    for name, recipe in recipes.items():
        logits, weights = loaded[name]
        materialise(context.policy, context.store, recipe)
        with torch.no_grad():
            ours = context.policy.eval()(torch.arange(6, 30).reshape(3, 8)).logits
        if name == "last" or rank == "exact":
            torch.testing.assert_close(logits, ours, atol=1e-5, rtol=0)
        for layer, change in product_sum(context, recipe).items():
            start = base.get_parameter(f"{layer}.weight").detach()
            found = weights[f"{layer}.weight"].double() - start
            if name == "last" or rank == "exact":
                torch.testing.assert_close(found, change, atol=1e-6, rtol=0)
            else:
                lost += float((found - change).square().sum())
                total += float(change.square().sum())
    config = json.loads((tmp_path / "export" / "merged" / "adapter_config.json").read_text())
    assert config["r"] == expected
    assert Path(config["base_model_name_or_path"]) == tmp_path / "model"
    printed = [line for line in capsys.readouterr().out.splitlines() if "relative error" in line]
    if rank == "exact":
        assert not printed
    else:
        error = (lost / total) ** 0.5
        assert printed == [f"export/merged: cut to rank {expected}, relative error {error:.1e}"]
        assert 0.05 < error < 0.9


def test_adapters_with_magnitudes_are_exported_whole(tmp_path: Path) -> None:
    context = adapters(tmp_path, 1, use_dora=True)
    finish_round([ModelExport(adapter_rank="policy")], context)
    back = PeftModel.from_pretrained(tiny_llama(), tmp_path / "export" / "last").eval()
    ids = torch.arange(6, 30).reshape(3, 8)
    with torch.no_grad():
        assert torch.equal(back(ids).logits, context.policy.eval()(ids).logits)
        assert not torch.equal(back(ids).logits, tiny_llama().eval()(ids).logits)
    assert not (tmp_path / "export" / "merged").exists(), "nothing chose a merge"


@pytest.mark.parametrize(
    ("lora", "rank", "sentence"),
    [
        (LoraSettings(r=2, use_dora=True), 4, "has use_dora, whose rank cannot be changed"),
        (None, 4, "the policy has no adapter"),
        (None, "policy", "the policy has no adapter"),
    ],
)
def test_a_rank_that_would_do_nothing_is_refused_before_any_stage(
    lora: LoraSettings | None, rank: Any, sentence: str, tmp_path: Path
) -> None:
    export_model(tiny_llama(), tiny_tokenizer(), None, tmp_path / "model")
    context = context_of(tmp_path, PretrainedPolicy(str(tmp_path / "model"), lora=lora))
    with pytest.raises(InputError, match=rf"adapter_rank is {rank}, but .*{sentence}"):
        finish_round([TrajectorySnapshot(), ModelExport(adapter_rank=rank)], context)
    assert not context.store.rounds


def test_the_folders_are_named_when_they_are_written(
    start: LettersPolicy, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    context = snapshots(tmp_path, start, 1)
    context.final = True
    finish_round([ReferenceMerge("uniform", ship_steps=0), ModelExport()], context)
    line = capsys.readouterr().out.splitlines()[-1]
    assert line == f"export: last, merged and best in {tmp_path / 'export'}"


def test_every_folder_states_its_recipe(tmp_path: Path) -> None:
    context = adapters(tmp_path, 2)
    context.store.update(2, metrics={"gold/in_domain": 2.0, "merge/gold/in_domain": 3.0})
    finish_round([ReferenceMerge("uniform"), ModelExport(adapter_rank="policy")], context)
    cards = {
        name: (tmp_path / "export" / name / "README.md").read_text(encoding="utf-8")
        for name in ("last", "merged", "best")
    }
    assert "| gold/in_domain | 2 |" in cards["last"]
    assert "| gold/in_domain | 3 |" in cards["merged"]
    assert "| adapter rank | 2 |" in cards["merged"]
    assert "| metrics measured | before the cut to that rank |" in cards["merged"]
    assert "metrics measured" not in cards["last"]
    assert f"| loss | {context.receiver.loss} |" in cards["merged"]
    assert "library_name: peft" in cards["merged"]
    assert cards["merged"].count("| 0.333333 |") == 3
    written = json.loads((tmp_path / "export" / "merged" / "recipe.json").read_text())
    assert written.pop("sha256") == context.store.recipe_sha256(Recipe.from_json(written))


@pytest.mark.parametrize("push", ["merged", "last"])
@pytest.mark.parametrize("fails", [False, True])
def test_one_folder_is_pushed_when_all_are_on_disk(
    push: Any, fails: bool, start: LettersPolicy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pushed: list[tuple[Path, str]] = []

    def record(folder: Path, repository: str) -> str | None:
        assert all((tmp_path / "export" / n / "README.md").is_file() for n in ("last", "merged"))
        pushed.append((folder, repository))
        return "it was not pushed" if fails else None

    monkeypatch.setattr(model_export, "push_folder", record)
    context = snapshots(tmp_path, start, 1)
    context.final = True
    export = ModelExport(push_to_hub="owner/name", push=push)
    if fails:
        with pytest.warns(UserWarning, match="it was not pushed"):
            finish_round([ReferenceMerge("uniform", ship_steps=0), export], context)
    else:
        finish_round([ReferenceMerge("uniform", ship_steps=0), export], context)
    assert pushed == [(tmp_path / "export" / push, "owner/name")]
    note = context.store.record(1).notes["push"]
    assert note == ("it was not pushed" if fails else f"{push} is at owner/name")
    assert "export" in context.store.record(1).seconds, "the run is complete either way"


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"adapter_rank": 0}, "adapter_rank is 0; it must be at least 1"),
        ({"push_to_hub": "https://hub/x/y"}, "push_to_hub is 'https://hub/x/y', which is no"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        ModelExport(**settings)


TRAIN = """
import sys
from datasets import Dataset
from peft import AutoPeftModelForCausalLM
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer
folder, adapter, out = sys.argv[1:]
plain = {"report_to": "none", "use_cpu": True, "bf16": False}
pairs = Dataset.from_list([{"prompt": "w0", "chosen": " w1", "rejected": " w2"}] * 2)
texts = Dataset.from_list([{"text": "w0 w1"}] * 2)
DPOTrainer(folder, args=DPOConfig(out, **plain), train_dataset=pairs)
SFTTrainer(folder, args=SFTConfig(out, **plain), train_dataset=texts)
# the path of an adapter is none of a model to TRL
model = AutoPeftModelForCausalLM.from_pretrained(adapter, is_trainable=True)
DPOTrainer(model, args=DPOConfig(out, **plain), train_dataset=pairs)
"""


@pytest.mark.slow
def test_trl_takes_the_folders(tmp_path: Path) -> None:
    pytest.importorskip("trl")
    export = [ReferenceMerge("uniform", ship_steps=0), ModelExport()]
    for root, context in (
        (tmp_path / "full", perturbed(tmp_path / "full", 1, None)),
        (tmp_path / "adapter", adapters(tmp_path / "adapter", 1)),
    ):
        finish_round(export, context)
        assert (root / "export" / "merged").is_dir()
    folders = [str(tmp_path / kind / "export" / "merged") for kind in ("full", "adapter")]
    command = [sys.executable, "-c", TRAIN, *folders, str(tmp_path / "out")]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def record(index: int, kl: float | None) -> Record:
    return Record(index, metrics={} if kl is None else {KL: kl})


@pytest.mark.parametrize(
    ("divergences", "best"),
    [
        ([0.0, 2.0, 5.0, 5.1, 4.9], 4),
        ([0.0, 2.0, 5.0, 5.1, 9.0], 2),
        ([0.0, 6.0, 7.0], 0),
        ([None, None, None], 2),
        ([1.0], 0),
    ],
)
def test_the_best_round_is_the_last_within_the_budget(
    divergences: list[float | None], best: int
) -> None:
    records = [record(index, kl) for index, kl in enumerate(divergences)]
    assert best_round(records, 5.0) == best
