"""Weights in the files of Hugging Face folders, memory-mapped, by the names they have there."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor

from tpmm_pl.models.location import first_line, loading
from tpmm_pl.tensor_files import read_tensors
from tpmm_pl.types import InputError

_FILES = ("model.safetensors", "pytorch_model.bin")
_INDEX = ".index.json"


def mapped_weights(folder: Path) -> dict[str, Tensor]:
    """Return the tensors of a model's files, one or several; they cost no private memory.

    Args:
        folder: As ``save_pretrained`` of any version writes it: safetensors, or else PyTorch's
            own format, of which weights alone are read.

    Raises:
        InputError: If there are no weights, a file is missing or broken, or an index lies.
    """
    for name in _FILES:
        if (folder / name).is_file():
            return _file(folder / name)
        if (folder / (name + _INDEX)).is_file():
            return _several(folder / (name + _INDEX))
    raise InputError(f"{folder} has neither {' nor '.join(_FILES)}; give a folder with weights")


def _several(index: Path) -> dict[str, Tensor]:
    where: dict[str, str] = loading(
        str(index), lambda: dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
    )
    tensors: dict[str, Tensor] = {}
    for name in dict.fromkeys(where.values()):
        if Path(name).name != name:
            raise InputError(f"{index} names {name!r}, which is in another folder; restore it")
        tensors |= _file(index.with_name(name))
    if tensors.keys() != where.keys():
        odd = min(tensors.keys() ^ where.keys())
        raise InputError(f"{index} and its files disagree on tensor {odd}; copy the whole folder")
    return tensors


def _file(path: Path) -> dict[str, Tensor]:
    if path.suffix != ".bin":
        return loading(str(path), lambda: read_tensors(path))
    try:
        return dict(torch.load(path, map_location="cpu", mmap=True, weights_only=True))
    except Exception as error:  # of the kinds that unpickling has
        raise InputError(
            f"cannot load {path} ({first_line(error)}); save the model anew, as safetensors"
        ) from error
