"""Where the files of a model come from: a folder, a GGUF file or the hub."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError

from tpmm_pl.types import InputError

_SMALL = ["*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken", "*.py"]
_NOT_THESE = ["original/*", "consolidated*"]

Loaded = TypeVar("Loaded")


def located(name: str, gguf_file: str | None, revision: str | None) -> tuple[Path, str | None]:
    """Return the folder of a model, fetched if it is on the hub, and its GGUF file's name.

    Args:
        name: Hub id, folder, or ``.gguf`` file.
        gguf_file: Name of the GGUF file within the folder or hub repository.
        revision: Branch, tag or commit on the hub.

    Raises:
        InputError: If there is no such folder or file, or the hub cannot be reached.
    """
    path = Path(name).expanduser()
    direct = path.suffix == ".gguf" and gguf_file is None
    if direct:
        path, gguf_file = path.parent, path.name
    if direct or path.is_dir():
        if gguf_file is not None and not (path / gguf_file).is_file():
            raise InputError(f"no file {path / gguf_file}; check the path")
        return path, gguf_file
    # a hub id is `name` or `owner/name`
    if path.is_absolute() or name.startswith((".", "~")) or len(path.parts) > 2:
        raise InputError(f"no model folder {path}; check the path, or give a hub id")
    if path.exists():
        raise InputError(f"{path} is a file, not a model; give its folder, or a .gguf file")
    return _fetched(name, gguf_file, revision), gguf_file


def is_hub_id(name: str) -> bool:
    """Say whether a model's name is an id on the hub and not a path here."""
    shape = re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", name)
    return shape is not None and not Path(name).exists()


def lasting_name(name: str) -> str:
    """Return a hub id as it is, not as a cache's path, and a path as one right from any folder."""
    return name if is_hub_id(name) else str(Path(name).expanduser().resolve())


def loading(name: str, load: Callable[[], Loaded]) -> Loaded:
    """Return what ``load`` does; its failures become one sentence about the model ``name``.

    Raises:
        InputError: If the files are missing, broken or of another kind.
    """
    try:
        return load()
    except torch.OutOfMemoryError:
        raise
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        raise InputError(
            f"cannot load {name} ({first_line(error)}); give a folder made by save_pretrained"
        ) from error


def first_line(error: BaseException) -> str:
    """Return the first line of an error's account, or its kind where it has none."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0].rstrip(".:") if lines else type(error).__name__


def _fetched(name: str, gguf_file: str | None, revision: str | None) -> Path:
    # fetched as a whole and then loaded as a folder: from_pretrained would ask the hub for every
    # file again, and retry each for half a minute where there is no network
    def fetch(weights: str) -> Path:
        patterns = [*_SMALL, weights]
        folder = snapshot_download(
            name, revision=revision, allow_patterns=patterns, ignore_patterns=_NOT_THESE
        )
        return Path(folder)

    try:
        folder = fetch(gguf_file or "*.safetensors")
        if gguf_file is None and not any(folder.glob("*.safetensors")):
            folder = fetch("*.bin")
    except (OSError, ValueError) as error:
        raise InputError(
            f"no folder {name} here, and the Hugging Face hub does not give it"
            f" ({first_line(error)}); check the name and the network, or give a folder"
        ) from error
    return folder
