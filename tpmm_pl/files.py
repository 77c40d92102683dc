"""Files and folders that are complete or absent: written beside, flushed to disk, renamed."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a path beside ``path`` to write to; on success it takes the place of ``path``.

    Args:
        path: The file to make or replace; missing folders are made.

    Yields:
        Where to write. It is removed again when the block raises.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield beside
        with beside.open("rb+") as written:
            os.fsync(written.fileno())
        beside.replace(path)
        _sync_folder(path.parent)
    finally:
        beside.unlink(missing_ok=True)


@contextmanager
def replacing_folder(path: Path) -> Iterator[Path]:
    """Yield a new folder beside ``path`` to fill; on success it takes the place of ``path``.

    Args:
        path: The folder to make or replace; missing parents are made.

    Yields:
        The folder to fill. It is removed again when the block raises, and ``path`` is kept.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    replaced = path.with_name(f".{path.name}.{os.getpid()}.old")
    shutil.rmtree(beside, ignore_errors=True)
    try:
        beside.mkdir()
        yield beside
        for written in filter(Path.is_file, beside.rglob("*")):
            with written.open("rb+") as opened:
                os.fsync(opened.fileno())
        if path.exists():
            path.rename(replaced)
        beside.rename(path)
        _sync_folder(path.parent)
    except BaseException:
        if replaced.exists():
            replaced.rename(path)
        raise
    finally:
        shutil.rmtree(beside, ignore_errors=True)
        shutil.rmtree(replaced, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Write ``text`` as UTF-8, atomically."""
    with replacing(path) as beside:
        beside.write_text(text, encoding="utf-8")


def file_sha256(path: Path) -> str:
    """Return the hexadecimal SHA-256 of a file, read in blocks."""
    digest = sha256()
    with path.open("rb") as opened:
        while block := opened.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def _sync_folder(folder: Path) -> None:
    # a rename is on disk only when its folder is; Windows cannot open folders and needs no sync
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
