"""A merge holds less than one model, measured in fresh processes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"

_MEASURED = """
import json, sys
from pathlib import Path
sys.path.append(sys.argv[1])
import torch
from page import PeakOfMemory
from tpmm_pl.commands.merge import merge_models
torch.set_num_threads(1)
*models, out, method = sys.argv[2:]
merge_models(models[:2], Path(out) / "first", method=method, json=True)  # what comes in once
with PeakOfMemory() as memory:
    merge_models(models, Path(out) / "second", method=method, json=True)
print(memory.peak - memory.start)
"""


@pytest.mark.parametrize("method", ["linear", "ties", "dare"])
def test_private_memory_stays_below_one_model_for_any_number_of_them(
    method: str, tmp_path: Path
) -> None:
    config = LlamaConfig(
        vocab_size=8000, hidden_size=512, intermediate_size=1024, num_hidden_layers=4,
        num_attention_heads=4, tie_word_embeddings=True,
    )  # fmt: skip
    folders = [tmp_path / f"m{seed}" for seed in range(2)]
    for folder in folders:
        model = LlamaForCausalLM(config)
        model.save_pretrained(folder)
    size = sum(4 * p.numel() for p in model.parameters())
    peaks = []
    for count in (3, 12):
        given = [str(folders[k % 2]) for k in range(count)]
        out = tmp_path / f"out{count}"
        out.mkdir()
        command = [sys.executable, "-c", _MEASURED, str(BENCHMARKS), *given, str(out), method]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        peaks.append(int(done.stdout.splitlines()[-1]))
    assert max(peaks) <= 1.3 * size
    assert peaks[1] - peaks[0] <= 0.3 * size
