"""Reference log-probabilities kept on disk, by what they were computed from."""

from __future__ import annotations

from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tpmm_pl import processes
from tpmm_pl.data.notices import say
from tpmm_pl.data.packing import TOKEN_BUDGET
from tpmm_pl.data.table import PairTable
from tpmm_pl.files import DiskError, replacing
from tpmm_pl.models.scoring import score_shared
from tpmm_pl.models.tree_pass import unwrapped
from tpmm_pl.types import PairLogps

_VERSION = 1
"""Raised when the same weights and tokens would get other values."""

_STATES = ("scaling", "_active_adapter", "_disable_adapters", "merged_adapters")
"""Of a layer with adapters, what it computes by beside its weights."""


def cached_logps(
    model: nn.Module, pairs: PairTable, folder: Path, *, token_budget: int = TOKEN_BUDGET
) -> PairLogps:
    """Score pairs without gradients, or read what the same weights gave the same tokens.

    Processes share the pairs; each then knows all log-probabilities.

    The name of an entry is a hash of weights, configuration, precision and tokens, so that a hit
    is exact to the last bit, and a run with another learning rate or seed of training still finds
    it. An entry that cannot be read is made again; where none can be written, a line says so.

    Args:
        model: As it scores, under the autocast that is on.
        pairs: What to score.
        folder: Holds the entries; made when the first is written.
        token_budget: Tokens of a batch.

    Returns:
        Log-probabilities in nats, ``(len(pairs),)`` float32 on the CPU.
    """
    path, known = processes.from_first(lambda: _look_up(model, pairs, folder))
    if known is not None:
        return PairLogps(**known)
    logps = score_shared(model, pairs, token_budget=token_budget)
    if processes.is_first():
        _write(path, logps)
    return logps


def _look_up(
    model: nn.Module, pairs: PairTable, folder: Path
) -> tuple[Path, dict[str, Tensor] | None]:
    path = folder / f"{_key(model, pairs)}.safetensors"
    if path.is_file():
        try:
            return path, load_file(path)
        except SafetensorError:
            say(f"{path} cannot be read; its pairs are scored again")
    return path, None


def _write(path: Path, logps: PairLogps) -> None:
    try:
        with replacing(path) as beside:
            save_file(logps._asdict(), beside)
    except (OSError, SafetensorError, DiskError) as error:
        say(f"{path.parent} cannot be written ({error}); log-probabilities are not kept")


def _key(model: nn.Module, pairs: PairTable) -> str:
    found = sha256()
    for part in (*_of_model(model), *_of_pairs(pairs)):
        found.update(part)
    return found.hexdigest()


def _of_model(model: nn.Module) -> Iterator[bytes]:
    device = next(model.parameters()).device.type
    autocast = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device)
    states = [[vars(module).get(name) for name in _STATES] for module in model.modules()]
    config = getattr(unwrapped(model), "config", None)
    settings = None if config is None else config.to_json_string(use_diff=False)
    yield repr((_VERSION, autocast, [state for state in states if any(state)], settings)).encode()
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        yield f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode()
        # a copy: what numpy has looked at cannot be freed when gathered weights are let go
        whole = tensor.detach().to("cpu", copy=True)
        yield whole.reshape(-1).view(torch.uint8).numpy().tobytes()


def _of_pairs(pairs: PairTable) -> Iterator[bytes]:
    yield pairs.swapped.tobytes()
    for name in ("prompt_ids", "chosen_ids", "rejected_ids"):
        column = pairs.columns.column(name).take(pairs.rows)
        for chunk in column.chunks:
            yield np.diff(chunk.offsets.to_numpy()).tobytes()
            yield chunk.flatten().to_numpy().tobytes()
