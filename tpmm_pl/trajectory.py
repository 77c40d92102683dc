"""The trajectory of policies on disk: snapshots and the manifest that records the rounds."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor

from tpmm_pl import processes
from tpmm_pl.files import inside, write_text
from tpmm_pl.tensor_files import check_sha256, read_tensors, write_tensors
from tpmm_pl.types import InputError, Recipe

VERSION = 1
CONTROL = "control"
"""Note of record 0 of a run that trains on its held-out pairs."""
GIVEN = "start_from"
"""Note of a round that was not trained in the run: where its weights come from."""
DROPPED = "snapshot"
"""Note of a round whose snapshot was not kept; its hash stays, recipes have been made with it."""

_WAY_OUT = "restore it or start over with --overwrite"


@dataclass(frozen=True)
class Record:
    """What is known of one round; ``None`` or empty until its stage is complete."""

    round: int
    snapshot: str | None = None
    """Path of the weights, relative to the trajectory's folder, as all paths here."""
    sha256: str | None = None
    recipe: Recipe | None = None
    """The reference of the NEXT round."""
    ship: dict[str, Recipe] = field(default_factory=dict)
    """What may be shipped after the last round, by name."""
    fuse: str | None = None
    """Held-out pairs made from this round's policy."""
    fuse_sha256: str | None = None
    pairs: str | None = None
    """Training pairs of the NEXT round, scored under ``recipe``."""
    pairs_sha256: str | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)
    """Sentences for a reader: that the guard acted, that a fit did not move."""

    def files(self) -> dict[str, str | None]:
        """Return the files that are there, with their hashes where they are known."""
        hashes = {
            self.snapshot: self.sha256,
            self.fuse: self.fuse_sha256,
            self.pairs: self.pairs_sha256,
        }
        return {name: digest for name, digest in hashes.items() if name is not None}


class SnapshotFile(Mapping[str, Tensor]):
    """The tensors of a snapshot, memory-mapped: they cost no private memory.

    Args:
        path: A safetensors file, or the index of several.

    Raises:
        InputError: If a file is missing or not readable as safetensors.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._tensors = read_tensors(path)
        except InputError:
            raise
        except (OSError, SafetensorError, ValueError) as error:
            raise InputError(f"the snapshot {path} cannot be read ({error}); {_WAY_OUT}") from error

    def __getitem__(self, name: str) -> Tensor:
        tensor: Tensor = self._tensors[name]
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


class TrajectoryStore:
    """Snapshots and one manifest, rewritten atomically as stages complete.

    All processes hold the same records; the first one writes. A file that a record names is
    handed out after it was compared with its recorded hash, once in a process.

    Args:
        root: The folder; made when the first snapshot is.

    Raises:
        InputError: If a manifest is there but cannot be read.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.manifest = root / "manifest.json"
        self.model: dict[str, Any] = {}
        self._records: dict[int, Record] = {}
        self._sources: dict[int, SnapshotFile] = {}
        self._sound: set[tuple[str, str]] = set()
        if self.manifest.exists():
            self._read()

    @property
    def rounds(self) -> list[Record]:
        """The records, oldest first."""
        return [self._records[index] for index in sorted(self._records)]

    @property
    def trained_on_fuse_pairs(self) -> bool:
        """Whether the run's held-out pairs were added to training, as in a control arm."""
        return CONTROL in self.record(0).notes

    def record(self, round_index: int) -> Record:
        """Return what is known of a round; an empty record if nothing is."""
        return self._records.get(round_index, Record(round_index))

    def update(self, round_index: int, **changes: Any) -> Record:
        """Set fields of a round's record and rewrite the manifest.

        ``seconds``, ``metrics`` and ``notes`` are added to what is there.
        """
        record = self.record(round_index)
        for name in ("seconds", "metrics", "notes"):
            if name in changes:
                changes[name] = {**getattr(record, name), **changes[name]}
        self._records[round_index] = replace(record, **changes)
        self._write()
        return self._records[round_index]

    def forget_after(self, round_index: int) -> None:
        """Drop the records of later rounds; a resumed run makes them again."""
        kept = {index: r for index, r in self._records.items() if index <= round_index}
        if kept != self._records:
            self._records = kept
            self._sources = {index: s for index, s in self._sources.items() if index in kept}
            self._write()

    def verify(self, closed: int) -> None:
        """Check every recorded file, as a run does that goes on.

        All processes call it; the first one reads the files.

        Args:
            closed: The last round that the run will not finish again. A later one that has a
                broken file is forgotten.

        Raises:
            InputError: If a file of a closed round is broken, or leads out of the folder.
        """
        broken = processes.from_first(self._broken)
        for index, fault in broken.items():
            if index <= closed:
                raise InputError(f"{fault}; {_WAY_OUT}")
        if broken:
            self.forget_after(min(broken) - 1)
        for record in self.rounds:
            self._sound |= {(name, digest) for name, digest in record.files().items() if digest}

    def describe_model(self, model: dict[str, Any]) -> None:
        """Record what the starting policy is (plain JSON values)."""
        self.model = model
        self._write()

    def folder(self, round_index: int) -> Path:
        """Return where the files of a round are."""
        return self.root / f"round_{round_index:03d}"

    def path(self, relative: str) -> Path:
        """Return the path of a file that a record names.

        Raises:
            InputError: If it leads out of the folder, or is not the file that was written.
        """
        path = inside(self.root, relative)
        known = {item for record in self.rounds for item in record.files().items()}
        for name, digest in known - self._sound:
            if name == relative and digest is not None:
                if (fault := check_sha256(path, digest)) is not None:
                    raise InputError(f"{fault}; {_WAY_OUT}")
                self._sound.add((name, digest))
        return path

    def relative(self, path: Path) -> str:
        """Return how a record names a file of the trajectory."""
        return path.relative_to(self.root).as_posix()

    def add_snapshot(
        self, round_index: int, state: Mapping[str, Tensor], file: str = "policy.safetensors"
    ) -> Record:
        """Write a policy's weights as the snapshot of a round, tensor by tensor.

        All processes call it; sharded tensors are gathered one at a time.

        Args:
            round_index: 0 for the starting policy, t for the policy after round t.
            state: The weights.
            file: Where below the round's folder.

        Returns:
            The record, with the path and hash of the file, or of the index of several.
        """
        path, digest = write_tensors(self.folder(round_index) / file, state)
        self._sources.pop(round_index, None)
        # its hash was made of what was written
        self._sound.add((self.relative(path), digest))
        return self.update(round_index, snapshot=self.relative(path), sha256=digest)

    def kept(self, round_index: int) -> tuple[int, ...]:
        """Return the rounds up to one whose snapshots there are, oldest first."""
        return tuple(r.round for r in self.rounds if r.snapshot and r.round <= round_index)

    def drop_snapshot(self, round_index: int) -> None:
        """Name a round's snapshot no more; its files stay until :meth:`delete_dropped`."""
        self._sources.pop(round_index, None)
        self.update(round_index, snapshot=None, notes={DROPPED: "not kept"})

    def delete_dropped(self) -> None:
        """Delete the files of snapshots that were dropped, on the first process."""
        if not processes.is_first():
            return
        for record in self.rounds:
            if record.snapshot is None and DROPPED in record.notes:
                folder = inside(self.root, self.folder(record.round).name)
                for file in folder.glob("policy*.safetensors*"):
                    file.unlink()
                shutil.rmtree(folder / "adapter", ignore_errors=True)

    def source(self, round_index: int) -> SnapshotFile:
        """Return a round's weights, memory-mapped.

        Raises:
            InputError: If there is no such snapshot, naming the rounds there are.
        """
        record = self.record(round_index)
        if record.snapshot is None:
            known = [record.round for record in self.rounds if record.snapshot]
            raise InputError(
                f"no snapshot of round {round_index} in {self.root}; there are {known}"
            )
        if round_index not in self._sources:
            self._sources[round_index] = SnapshotFile(self.path(record.snapshot))
        return self._sources[round_index]

    def sources(self, recipe: Recipe) -> list[SnapshotFile]:
        """Return the snapshots that a recipe merges, in its order."""
        return [self.source(index) for index in recipe.snapshots]

    def recipe_sha256(self, recipe: Recipe) -> str:
        """Hash a recipe with the hashes of the snapshots that it names."""
        return recipe.sha256([self.record(index).sha256 or "" for index in recipe.snapshots])

    def _write(self) -> None:
        content = {
            "version": VERSION,
            "model": self.model,
            "rounds": [self._to_json(record) for record in self.rounds],
        }
        if processes.is_first():
            write_text(self.manifest, json.dumps(content, indent=1) + "\n")

    def _broken(self) -> dict[int, str]:
        found = (
            (record.round, check_sha256(inside(self.root, name), digest))
            for record in self.rounds
            for name, digest in record.files().items()
            if digest is not None and (name, digest) not in self._sound
        )
        return {index: fault for index, fault in found if fault is not None}

    def _to_json(self, record: Record) -> dict[str, Any]:
        content = asdict(record)
        if record.recipe is not None:
            content["recipe"] = self._recipe_to_json(record.recipe)
        content["ship"] = {name: self._recipe_to_json(r) for name, r in record.ship.items()}
        return content

    def _recipe_to_json(self, recipe: Recipe) -> dict[str, Any]:
        return {**recipe.to_json(), "sha256": self.recipe_sha256(recipe)}

    def _recipe_from_json(self, written: dict[str, Any]) -> Recipe:
        recipe = Recipe.from_json(written)
        if self.recipe_sha256(recipe) != written["sha256"]:
            raise ValueError(f"a recipe of snapshots {recipe.snapshots} has another hash")
        return recipe

    def _checked(self, record: Record) -> Record:
        if not isinstance(record.round, int):
            raise TypeError(f"{record.round!r} is no round")
        for name in record.files():
            inside(self.root, name)
        return record

    def _read(self) -> None:
        try:
            content = json.loads(self.manifest.read_text(encoding="utf-8"))
            if content["version"] != VERSION:
                raise ValueError(f"version {content['version']}, known is {VERSION}")
            self.model = content["model"]
            for item in content["rounds"]:
                recipe, ship = item.pop("recipe"), item.pop("ship")
                # the record first: its own recipe's hash is made from its snapshot's
                record = self._checked(Record(**item))
                self._records[record.round] = record
                self._records[record.round] = replace(
                    record,
                    recipe=None if recipe is None else self._recipe_from_json(recipe),
                    ship={name: self._recipe_from_json(r) for name, r in ship.items()},
                )
        except InputError:
            raise
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            raise InputError(f"{self.manifest} cannot be read ({error!r}); {_WAY_OUT}") from error
