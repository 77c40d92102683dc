"""Data sets of the ``datasets`` library: on the Hugging Face hub, or saved in a folder."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from hashlib import sha256
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from tpmm_pl.data.rows.slices import Slice
from tpmm_pl.files import file_sha256
from tpmm_pl.types import InputError

_SAVED = ("dataset_info.json", "dataset_dict.json")


class HubData(NamedTuple):
    """What ``datasets.load_dataset`` needs to know; a folder has a path only."""

    path: str
    name: str | None = None
    revision: str | None = None
    streaming: bool = False


def is_saved(folder: Path) -> bool:
    """Tell whether ``datasets`` saved a data set in a folder (``save_to_disk``)."""
    return any((folder / name).is_file() for name in _SAVED)


def dataset_rows(data: HubData, part: Slice) -> Iterator[tuple[str, dict[str, Any]]]:
    """Read rows in their order, from memory-mapped files or, streaming, as they arrive.

    Args:
        data: A data set on the hub, or a folder.
        part: Which split and rows.

    Yields:
        Where a row stands, and the row.

    Raises:
        InputError: If there is no such data set or split, or it cannot be read on.
    """
    with _explained(data.path):
        opened = _open(data, part.split)
        start, stop = part.bounds(lambda: _count(opened, data.path))
        rows = opened.skip(start) if start else opened
        label = " ".join(name for name in (data.path, data.name, part.split) if name)
        for number, row in enumerate(islice(rows, None if stop is None else max(stop - start, 0))):
            yield f"{label}, row {start + number + 1}", row


def dataset_fingerprint(data: HubData, part: Slice) -> str:
    """Return what changes when the rows do: content of a folder, version on the hub.

    Raises:
        InputError: As :func:`dataset_rows`.
    """
    folder = Path(data.path)
    if folder.is_dir():
        digest = sha256()
        for path in sorted(filter(Path.is_file, folder.rglob("*"))):
            digest.update(f"{path.relative_to(folder)} {file_sha256(path)}\n".encode())
        return digest.hexdigest()
    with _explained(data.path):
        if not data.streaming:
            return str(_open(data, part.split)._fingerprint)
        from huggingface_hub import HfApi

        return str(HfApi().dataset_info(data.path, revision=data.revision).sha)


def _open(data: HubData, split: str | None) -> Any:
    import datasets

    if not Path(data.path).is_dir():
        loaded = datasets.load_dataset(
            data.path, data.name, revision=data.revision, split=split, streaming=data.streaming
        )
        return _one_split(loaded, split, data.path)
    loaded = _one_split(datasets.load_from_disk(data.path), split, data.path)
    return loaded.to_iterable_dataset() if data.streaming else loaded


def _one_split(loaded: Any, split: str | None, path: str) -> Any:
    if not isinstance(loaded, Mapping):
        return loaded
    if split is None and len(loaded) == 1:
        return next(iter(loaded.values()))
    if split not in loaded:
        asked = "no split is chosen" if split is None else f"there is no split {split!r}"
        raise InputError(f"{path}: {asked}; give split as one of {', '.join(map(str, loaded))}")
    return loaded[split]


def _count(opened: Any, path: str) -> int:
    if not hasattr(opened, "num_rows"):
        raise InputError(
            f"{path}: a stream does not tell how many rows it has; give split without percentages"
            " and rows counted from the end, or leave streaming off"
        )
    return int(opened.num_rows)


@contextmanager
def _explained(path: str) -> Iterator[None]:
    from datasets.exceptions import DatasetNotFoundError

    try:
        yield
    except InputError:
        raise
    except DatasetNotFoundError as error:
        raise InputError(
            f"no file or folder {path}, and no data set of this name on the Hugging Face hub that"
            " you may read; check the name, or log in with 'hf auth login'"
        ) from error
    except ConnectionError as error:
        raise InputError(
            f"no file or folder {path}, and the Hugging Face hub cannot be reached for a data set"
            f" of this name ({_first_line(error)}); check the path or the network"
        ) from error
    except Exception as error:  # a library of many formats fails in many ways
        raise InputError(
            f"{path} cannot be loaded ({type(error).__name__}: {_first_line(error)}); check path,"
            " name, split and revision"
        ) from error


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [""])[0]
