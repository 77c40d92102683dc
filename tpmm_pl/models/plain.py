"""Scores by plain transformers, in a process where nothing of this package can help."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import torch
from torch import Tensor

from tpmm_pl.types import RunError

_SCRIPT = """
import json, sys, torch
from transformers import AutoModelForSequenceClassification as Auto
asked = json.load(sys.stdin)
model = Auto.from_pretrained(asked["folder"], dtype=getattr(torch, asked["dtype"])).eval()
with torch.no_grad():
    ids, mask = torch.tensor(asked["ids"]), torch.tensor(asked["mask"])
    print(json.dumps(model(input_ids=ids, attention_mask=mask).logits.float().flatten().tolist()))
"""


def plain_scores(folder: Path, input_ids: Tensor, attention_mask: Tensor, *, dtype: str) -> Tensor:
    """Return the score of each row by ``AutoModelForSequenceClassification`` in a new process.

    Args:
        folder: A ``save_pretrained`` folder of a model with one output.
        input_ids: ``(N, T)`` int64.
        attention_mask: ``(N, T)``, 1 on tokens.
        dtype: To load the weights in.

    Returns:
        ``(N,)`` float32 on the CPU.

    Raises:
        RunError: If transformers cannot load the folder.
    """
    asked = {
        "folder": str(folder), "dtype": dtype, "ids": input_ids.tolist(),
        "mask": attention_mask.tolist(),
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", _SCRIPT], input=json.dumps(asked), text=True, capture_output=True,
        check=False,
    )  # fmt: skip
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:]
        raise RunError(f"plain transformers cannot load {folder}: {' '.join(last)}")
    return torch.tensor(json.loads(done.stdout.strip().splitlines()[-1]))
