"""Mixtures of experts as folders: the dense architecture's configuration, our settings, shards."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from copy import deepcopy
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from tpmm_pl.files import replacing_folder
from tpmm_pl.moe.convert import moe_layers, upcycle
from tpmm_pl.moe.routing import MoESettings
from tpmm_pl.types import InputError

SETTINGS = "moe.json"
INDEX = "moe.safetensors.index.json"
VERSION = 1


def save_moe(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, out: Path) -> None:
    """Write a mixture of experts as :func:`load_moe` reads it.

    The weights are not named ``model.safetensors``: transformers would load those it knows, draw
    the feed-forward layers at random and only warn. One shard a block is in memory at a time. The
    folder is written beside and renamed; one that is there is replaced only then.

    Args:
        model: An upcycled sequence classification model.
        tokenizer: Its tokenizer.
        out: The folder to make or replace.

    Raises:
        InputError: If the model is no mixture.
    """
    layers = moe_layers(model)
    if not layers:
        raise InputError(f"the {type(model).__name__} is no mixture of experts; upcycle it first")
    settings = next(iter(layers.values())).settings
    with replacing_folder(out) as beside:
        tied = _write_weights(model.state_dict(), beside)
        record = {"version": VERSION, "settings": asdict(settings), "tied": tied}
        _write_json(beside / SETTINGS, record)
        config = deepcopy(model.config)
        config.architectures = [type(model).__name__]
        config.dtype = model.dtype
        config.save_pretrained(beside)
        tokenizer.save_pretrained(beside)


def is_moe_folder(path: str | Path) -> bool:
    """Say whether :func:`save_moe` wrote this folder."""
    return (Path(path) / SETTINGS).is_file()


def load_moe(
    folder: Path, *, dtype: torch.dtype, trust_remote_code: bool = False
) -> PreTrainedModel:
    """Return the mixture of experts that a folder holds, in evaluation mode, on the CPU.

    Args:
        folder: Written by :func:`save_moe`.
        dtype: Of the weights; routers are float32 in any case.
        trust_remote_code: Whether to run code that comes with the model.

    Raises:
        InputError: If the folder is no such one, incomplete, or of another version.
    """
    record = _read_record(folder)
    config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    # every weight drawn here is overwritten: the run's own random numbers must not move
    with torch.random.fork_rng(devices=[]):
        model = AutoModelForSequenceClassification.from_config(
            config, dtype=dtype, trust_remote_code=trust_remote_code
        )
    upcycle(model, MoESettings(**record["settings"]), generator=torch.Generator())
    _read_weights(model.state_dict(), folder, record["tied"])
    model.config._name_or_path = str(folder)
    return cast(PreTrainedModel, model.eval())


def _write_weights(state: Mapping[str, Tensor], folder: Path) -> dict[str, str]:
    """Write one shard a block and the index; return the names left out, with their twins'."""
    first: dict[tuple[Any, ...], str] = {}
    tied, blocks = {}, dict[str, dict[str, Tensor]]()
    for name, tensor in state.items():
        # safetensors refuses tensors that share memory, as tied embeddings do
        place = (tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride())
        twin = first.setdefault(place, name)
        if twin != name and tensor.numel():
            tied[name] = twin
        else:
            blocks.setdefault(_block(name), {})[name] = tensor
    where: dict[str, str] = {}
    for number, tensors in enumerate(blocks.values(), start=1):
        file = f"moe-{number:05d}-of-{len(blocks):05d}.safetensors"
        shard = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        save_file(shard, folder / file, metadata={"format": "pt"})
        where |= dict.fromkeys(tensors, file)
    size = sum(t.numel() * t.element_size() for block in blocks.values() for t in block.values())
    _write_json(folder / INDEX, {"metadata": {"total_size": size}, "weight_map": where})
    return tied


@torch.no_grad()
def _read_weights(state: Mapping[str, Tensor], folder: Path, tied: Mapping[str, str]) -> None:
    """Copy the shards into the tensors of a model's state."""
    left = dict(state)
    for names in _shards(folder):
        for name, tensor in names.items():
            for twin in (name, *(alias for alias, source in tied.items() if source == name)):
                target = left.pop(twin, None)
                if target is None or target.shape != tensor.shape:
                    raise InputError(
                        f"{folder}: {twin} is not the configured model's; save it anew"
                    )
                target.copy_(tensor)
    if left:
        raise InputError(f"{folder} lacks {len(left)} weights, as {next(iter(left))}; save it anew")


def _shards(folder: Path) -> Iterator[dict[str, Tensor]]:
    for file in dict.fromkeys(_read_json(folder / INDEX)["weight_map"].values()):
        if not (folder / file).is_file():
            raise InputError(f"{folder} lacks {file}; copy the whole folder")
        yield load_file(folder / file)


def _read_record(folder: Path) -> dict[str, Any]:
    if not is_moe_folder(folder):
        raise InputError(f"{folder} has no {SETTINGS}; give a folder of a mixture of experts")
    record = _read_json(folder / SETTINGS)
    if record.get("version") != VERSION:
        raise InputError(
            f"{folder / SETTINGS} has version {record.get('version')}, this program reads "
            f"{VERSION}; use the program that wrote it"
        )
    return record


def _block(name: str) -> str:
    """Return the part of a name up to its first number: a block's; or nothing."""
    parts = name.split(".")
    numbers = [index for index, part in enumerate(parts) if part.isdigit()]
    return ".".join(parts[: numbers[0] + 1]) if numbers else ""


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return cast(dict[str, Any], json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read {path} ({error}); copy the whole folder") from error
