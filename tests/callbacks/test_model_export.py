from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.callbacks.letters_run import snapshots
from tests.models.tiny import tiny_llama, tiny_tokenizer
from tpmm_pl.callbacks import ModelExport, ReferenceMerge, finish_round
from tpmm_pl.callbacks.model_export import best_round
from tpmm_pl.merging import linear_merge
from tpmm_pl.models.export import export_model
from tpmm_pl.models.load import LoraSettings, PretrainedPolicy
from tpmm_pl.toy.start import LettersPolicy
from tpmm_pl.trajectory import Record

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


def test_an_adapter_is_exported_as_adapter_folders(tmp_path: Path) -> None:
    export_model(tiny_llama(), tiny_tokenizer(), None, tmp_path / "model")
    source = PretrainedPolicy(str(tmp_path / "model"), lora=LoraSettings(r=2, alpha=4))
    context = snapshots(tmp_path, source, 1)
    context.data.tokenizer = tiny_tokenizer()
    context.final = True
    finish_round([ReferenceMerge("uniform"), ModelExport()], context)
    for name in ("last", "merged", "best"):
        assert (tmp_path / "export" / name / "adapter_model.safetensors").is_file(), name


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
