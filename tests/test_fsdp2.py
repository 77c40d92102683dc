"""Two processes that hold half of the model each end where one process ends."""

from __future__ import annotations

import ctypes
import gc
from functools import partial
from pathlib import Path
from typing import cast

import pytest
import torch
import torch.distributed as dist
from lightning.fabric import Fabric
from lightning.pytorch import Callback, LightningModule, Trainer
from peft import LoraConfig, PeftModel, get_peft_model
from torch.distributed.device_mesh import init_device_mesh
from transformers import LlamaConfig, LlamaForCausalLM

from tests.models.tiny import tiny_gpt2, tiny_llama
from tests.test_ddp import assert_same_run
from tests.two_processes import (
    PeakMemory,
    TinySource,
    coefficients,
    drawn_pairs,
    fit,
    together,
    weights,
)
from tpmm_pl.data.batching import collate
from tpmm_pl.fabric import fit_with_fabric
from tpmm_pl.models.sharding import shard_model
from tpmm_pl.models.weights import save_policy
from tpmm_pl.modules.fusion import FusionSettings, FusionWeights
from tpmm_pl.trajectory import TrajectoryStore

SOURCES = {
    "llama_tied": TinySource(partial(tiny_llama, tied=True)),
    "llama": TinySource(tiny_llama),
    "gpt2": TinySource(partial(tiny_gpt2, dropout=0.0)),
}


@pytest.mark.parametrize("family", SOURCES)
def test_two_processes_of_shards_end_where_one_ends(family: str, tmp_path: Path) -> None:
    fit(tmp_path / "one", source=SOURCES[family])
    sharded = partial(fit, tmp_path / "two", strategy="fsdp2", processes=2, source=SOURCES[family])
    together(sharded)
    assert_same_run(tmp_path / "two", tmp_path / "one")


class StopAfterRound(Callback):
    """Ends the process behind the first round's last stage."""

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        raise SystemExit(0)


def test_shards_that_are_stopped_go_on_to_the_same_weights(tmp_path: Path) -> None:
    sharded = partial(fit, strategy="fsdp2", processes=2)
    together(partial(sharded, tmp_path / "whole"))
    together(partial(sharded, tmp_path / "cut", callbacks=[StopAfterRound()]))
    assert len(TrajectoryStore(tmp_path / "cut" / "trajectory").rounds) == 2
    together(partial(sharded, tmp_path / "cut", resume=True))
    expected, found = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())
    assert found.keys() == expected.keys()
    assert coefficients(tmp_path / "cut") == coefficients(tmp_path / "whole")


def wide_llama() -> LlamaForCausalLM:
    """Fifteen million parameters, so that a copy of them shows in a process's memory."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=2048,
        hidden_size=384,
        intermediate_size=1536,
        num_hidden_layers=6,
        num_attention_heads=4,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config)


def write_snapshots(root: Path, count: int) -> None:
    store, model = TrajectoryStore(root / "trajectory"), wide_llama()
    for index in range(count):
        save_policy(model, store, index)
        for parameter in model.parameters():
            parameter.data += 0.01 * torch.randn_like(parameter)


def fuse_and_note_memory(root: Path, snapshots: int) -> None:
    """Take fusion steps on a sharded model; write this process's peak above its start, in bytes."""
    libc = ctypes.CDLL(None)
    libc.mallopt(-3, 1 << 16)  # M_MMAP_THRESHOLD: what is freed is the system's again at once
    dist.init_process_group("gloo")
    names = ("data_parallel", "tensor_parallel")
    model = wide_llama()
    shard_model(model, init_device_mesh("cpu", (2, 1), mesh_dim_names=names))
    store, fabric = TrajectoryStore(root / "trajectory"), Fabric(accelerator="cpu", devices=1)
    steps = [[collate(drawn_pairs(2, f"{dist.get_rank()} {step}"))] for step in range(3)]

    def bound(count: int) -> FusionWeights:
        return FusionWeights(FusionSettings(steps=3)).bind(model, store, tuple(range(count)))

    # what the first pass of a process takes, whatever it merges
    fit_with_fabric(fabric, bound(1), steps, title="fusion")
    module = bound(snapshots)  # apart: it gathers the model once
    gc.collect()
    libc.malloc_trim(0)
    with PeakMemory() as peak:
        fit_with_fabric(fabric, module, steps, title="fusion")
    (root / f"peak_{snapshots}_{dist.get_rank()}").write_text(str(peak.bytes))


def test_no_process_holds_the_snapshots_that_it_merges(tmp_path: Path) -> None:
    write_snapshots(tmp_path, 8)
    for snapshots in (2, 8):
        together(partial(fuse_and_note_memory, tmp_path, snapshots), start="spawn")
    size = sum(p.numel() * p.element_size() for p in wide_llama().parameters())
    for rank in range(2):
        few, many = (int((tmp_path / f"peak_{k}_{rank}").read_text()) for k in (2, 8))
        assert many - few < 0.05 * size, (few, many, size)


def with_adapter() -> PeftModel:
    torch.manual_seed(1)
    settings = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    return cast(PeftModel, get_peft_model(tiny_llama(), settings))


def test_adapters_on_a_sharded_model_end_where_one_process_ends(tmp_path: Path) -> None:
    source = TinySource(with_adapter)
    fit(tmp_path / "one", source=source)
    together(partial(fit, tmp_path / "two", strategy="fsdp2", processes=2, source=source))
    assert_same_run(tmp_path / "two", tmp_path / "one")
