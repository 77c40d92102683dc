"""Files and folders that are complete or absent: written beside, flushed to disk, renamed."""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path

from tpmm_pl.types import InputError, RunError

_FULL = (errno.ENOSPC, errno.EDQUOT)
_DENIED = (errno.EACCES, errno.EPERM)


class DiskError(RunError):
    """The disk takes no more: one sentence with the path, the reason and the free space."""


def disk_fault(error: BaseException, path: Path | None = None) -> DiskError | None:
    """Return the sentence of a disk that is full or closed to writing, if that is what failed.

    Args:
        error: Looked at with all that led to it.
        path: What was being written; where it is not known, a file that may not be opened is no
            fault of the disk.
    """
    for seen in causes(error):
        if isinstance(seen, DiskError):
            return seen
        number = _number(seen)
        if number in _FULL:
            return _unwritten(number, path or getattr(seen, "filename", None), "make room")
        if number == errno.EROFS or (path is not None and number in _DENIED):
            place = path or getattr(seen, "filename", None)
            return _unwritten(number, place, "allow writing there")
    return None


def causes(error: BaseException, *, hidden: bool = False) -> Iterator[BaseException]:
    """Yield an error and what led to it, the last first, each once: chains can run in a ring.

    Args:
        error: Where to begin.
        hidden: Also what ``raise .. from None`` hides.
    """
    seen: list[BaseException] = []
    following: BaseException | None = error
    while following is not None and not any(following is one for one in seen):
        yield following
        seen.append(following)
        shown = hidden or not following.__suppress_context__
        following = following.__cause__ or (following.__context__ if shown else None)


def refuse_unwritable(folder: Path) -> None:
    """Check that files can be made in a folder, or that the folder can.

    Raises:
        InputError: If not.
    """
    there = _existing(folder)
    if not (there.is_dir() and os.access(there, os.W_OK | os.X_OK)):
        raise InputError(
            f"{folder} cannot be written ({there} takes no files); choose another folder, or "
            "allow writing there"
        )


def inside(root: Path, relative: str) -> Path:
    """Return the path of a file that a record names, below the record's own folder.

    Raises:
        InputError: If it leads out of the folder: absolute, by ``..`` or by a symbolic link.
    """
    path = root / relative
    lexical = Path(relative)
    leaves = lexical.is_absolute() or ".." in lexical.parts
    if leaves or not path.resolve().is_relative_to(root.resolve()):
        raise InputError(
            f"{relative!r} leads out of {root}, whose records may name only what lies in it; "
            "restore the record, or put the file itself there"
        )
    return path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a path beside ``path`` to write to; on success it takes the place of ``path``.

    Args:
        path: The file to make or replace; missing folders are made.

    Yields:
        Where to write. It is removed again when the block raises.

    Raises:
        DiskError: If the disk is full or closed to writing; ``path`` is as it was.
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    with _disk_faults(path):
        path.parent.mkdir(parents=True, exist_ok=True)
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
        path: The folder to make, or what to replace by it; missing parents are made.

    Yields:
        The folder to fill. It is removed again when the block raises, and ``path`` is kept.

    Raises:
        DiskError: If the disk is full or closed to writing.
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    replaced = path.with_name(f".{path.name}.{os.getpid()}.old")
    shutil.rmtree(beside, ignore_errors=True)
    try:
        with _disk_faults(path):
            path.parent.mkdir(parents=True, exist_ok=True)
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
        if replaced.is_file():
            replaced.unlink()
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


@contextmanager
def _disk_faults(path: Path) -> Iterator[None]:
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        if (fault := disk_fault(error, path)) is not None:
            raise fault from error
        raise


def _unwritten(number: int, place: Path | str | None, way_out: str) -> DiskError:
    reason = os.strerror(number).lower()
    if number in _FULL and place is not None:
        free = shutil.disk_usage(_existing(Path(place))).free / 1e6
        reason += f", {free:,.1f} MB are free"
    return DiskError(f"{place or 'a file'} cannot be written ({reason}); {way_out}")


def _number(error: BaseException) -> int:
    if isinstance(error, OSError):
        return error.errno or 0
    # as safetensors says it
    found = re.search(r"\(os error (\d+)\)", str(error))
    return int(found[1]) if found else 0


def _existing(path: Path) -> Path:
    return next(place for place in (path, *path.absolute().parents) if place.exists())


def _sync_folder(folder: Path) -> None:
    # a rename is on disk only when its folder is; Windows cannot open folders and needs no sync
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
