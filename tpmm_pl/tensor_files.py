"""Safetensors files written tensor by tensor, and read back memory-mapped."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from hashlib import sha256
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor
from torch.distributed.tensor import DTensor

from tpmm_pl import processes
from tpmm_pl.files import file_sha256, inside, replacing, write_text
from tpmm_pl.types import InputError

LARGEST_FILE = 5_000_000_000
"""Bytes of tensors above which a state becomes several files with an index."""

INDEX = ".index.json"

# the format's own order, so that files are byte for byte those of `safetensors.torch.save_file`
_KINDS = {
    torch.uint64: "U64",
    torch.int64: "I64",
    torch.float64: "F64",
    torch.float32: "F32",
    torch.uint32: "U32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.uint16: "U16",
    torch.int16: "I16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


class WrittenFile(NamedTuple):
    """A file and its hash."""

    path: Path
    sha256: str


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], *, largest: int = LARGEST_FILE
) -> WrittenFile:
    """Write tensors as safetensors, one at a time, hashed while they are written.

    All processes call it with the same names. A sharded tensor is gathered when its turn comes;
    the first process writes it and holds no other. Nothing is read again.

    Args:
        path: The file to make or replace. Where the tensors have more than ``largest`` bytes there
            are files ``policy-00001-of-0000N.safetensors`` beside it, and ``path`` with
            ``.index.json`` says which tensor is where (the form of Hugging Face), with the
            files' hashes in its metadata.
        tensors: What to write, each of a type and shape of its own; may be on any device.
        largest: Bytes of tensors in one file; a larger tensor has a file to itself.

    Returns:
        The file, or the index, and its SHA-256.

    Raises:
        InputError: If a tensor's type has no place in the format.
    """
    files = _files(path, tensors, largest)
    whole = (_whole(tensors[name]) for names in files.values() for name in names)
    written: WrittenFile | Exception | None = None
    if processes.is_first():
        try:
            written = _write(path, tensors, files, whole)
        except Exception as error:
            written = error
    # to gather is to wait for each other: also after a failure, and where nothing is written
    deque(whole, maxlen=0)

    def outcome() -> WrittenFile:
        if isinstance(written, WrittenFile):
            return written
        raise written  # type: ignore[misc] # on the first process it is not None

    return processes.from_first(outcome)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file or of an index's files, memory-mapped.

    Raises:
        OSError: If a file is missing.
        SafetensorError: If a file is not readable as safetensors.
        ValueError: If the index is not readable, or a tensor is not where it says.
    """
    if not path.name.endswith(INDEX):
        return _opened(path)
    tensors: dict[str, Tensor] = {}
    for name in parts(path):
        tensors |= _opened(inside(path.parent, name))
    if tensors.keys() != _index(path)["weight_map"].keys():
        raise ValueError("its files have other tensors than it says")
    return tensors


def parts(index: Path) -> dict[str, str]:
    """Return the files that an index names, with their hashes.

    Raises:
        InputError: If a file is not in the index's own folder.
        ValueError: If the index is not readable.
    """
    content = _index(index)
    try:
        hashes: dict[str, str] = content["metadata"]["sha256"]
        if set(hashes) != set(content["weight_map"].values()):
            raise ValueError("its files and its hashes disagree")
    except (LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"it is no index of tensors ({error!r})") from error
    for name in hashes:
        if inside(index.parent, name).parent != index.parent:
            raise InputError(f"{index} names {name!r}, which is in another folder; restore it")
    return hashes


def check_sha256(path: Path, expected: str) -> str | None:
    """Return what is wrong with a file, and with those that it names if it is an index.

    Args:
        path: To be read whole.
        expected: Its recorded SHA-256.

    Returns:
        ``None`` where everything is as it was written.
    """
    try:
        if file_sha256(path) != expected:
            return f"{path} is not the file that was written: its sha256 is another one"
        if not path.name.endswith(INDEX):
            return None
        faults = (check_sha256(inside(path.parent, n), digest) for n, digest in parts(path).items())
        return next(filter(None, faults), None)
    except FileNotFoundError:
        return f"{path} is missing"
    except OSError as error:
        return f"{path} cannot be read ({error.strerror})"


def _files(path: Path, tensors: Mapping[str, Tensor], largest: int) -> dict[str, list[str]]:
    """Return the names of the files, each with those of its tensors in their order."""
    kinds = list(_KINDS)
    for name, tensor in tensors.items():
        if tensor.dtype not in _KINDS:
            raise InputError(f"{name} is {tensor.dtype}, which safetensors files cannot hold")
    order = sorted(tensors, key=lambda name: (kinds.index(tensors[name].dtype), name))
    groups: list[list[str]] = [[]]
    room = largest
    for name in order:
        room -= tensors[name].nbytes
        if room < 0 and groups[-1]:
            groups.append([])
            room = largest - tensors[name].nbytes
        groups[-1].append(name)
    if len(groups) == 1:
        return {path.name: groups[0]}
    count = len(groups)
    return {
        f"{path.stem}-{number:05d}-of-{count:05d}{path.suffix}": names
        for number, names in enumerate(groups, 1)
    }


def _write(
    path: Path,
    tensors: Mapping[str, Tensor],
    files: Mapping[str, Sequence[str]],
    whole: Iterator[Tensor],
) -> WrittenFile:
    hashes = {
        file: _write_file(path.with_name(file), _header(tensors, names), islice(whole, len(names)))
        for file, names in files.items()
    }
    if len(files) == 1:
        return WrittenFile(path, hashes[path.name])
    total = sum(tensor.nbytes for tensor in tensors.values())
    content = {
        "metadata": {"total_size": total, "sha256": hashes},
        "weight_map": {name: file for file, names in files.items() for name in names},
    }
    text = json.dumps(content, indent=2) + "\n"
    # last: what it names is there
    write_text(path.with_name(path.name + INDEX), text)
    return WrittenFile(path.with_name(path.name + INDEX), sha256(text.encode()).hexdigest())


def _header(tensors: Mapping[str, Tensor], names: Sequence[str]) -> bytes:
    content: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in names:
        tensor = tensors[name]
        begin, end = end, end + tensor.nbytes
        content[name] = {
            "dtype": _KINDS[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(content, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _write_file(path: Path, header: bytes, whole: Iterator[Tensor]) -> str:
    digest = sha256(header)
    with replacing(path) as beside, beside.open("wb") as file:
        file.write(header)
        for tensor in whole:
            content = tensor.reshape(-1).view(torch.uint8).numpy().data
            digest.update(content)
            file.write(content)
            # before the next one is gathered: only one is held
            del tensor, content
    return digest.hexdigest()


def _whole(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    if isinstance(tensor, DTensor):
        tensor = tensor.full_tensor()
    return tensor.cpu().contiguous()


def _opened(path: Path) -> dict[str, Tensor]:
    file = safe_open(path, framework="pt")
    return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping


def _index(path: Path) -> dict[str, Any]:
    content = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict) or not isinstance(content.get("weight_map"), dict):
        raise ValueError("it is no index of tensors")
    return content
