"""The trajectory of policies on disk: snapshots and the manifest that records the rounds."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from tpmm_pl.files import file_sha256, replacing, write_text
from tpmm_pl.types import InputError, Recipe

VERSION = 1
CONTROL = "control"
"""Note of record 0 of a run that trains on its held-out pairs."""
GIVEN = "start_from"
"""Note of a round that was not trained in the run: where its weights come from."""


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
    pairs: str | None = None
    """Training pairs of the NEXT round, scored under ``recipe``."""
    seconds: dict[str, float] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)
    """Sentences for a reader: that the guard acted, that a fit did not move."""


class SnapshotFile(Mapping[str, Tensor]):
    """The tensors of a safetensors file, memory-mapped: they cost no private memory.

    Raises:
        InputError: If the file is missing or not readable as safetensors.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            opened = safe_open(path, framework="pt")
            self._tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - no mapping
        except (OSError, SafetensorError) as error:
            raise InputError(
                f"the snapshot {path} cannot be read ({error}); restore it or start over "
                "with --overwrite"
            ) from error

    def __getitem__(self, name: str) -> Tensor:
        tensor: Tensor = self._tensors[name]
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


class TrajectoryStore:
    """Append-only snapshots and one manifest, rewritten atomically as stages complete.

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

    def describe_model(self, model: dict[str, Any]) -> None:
        """Record what the starting policy is (plain JSON values)."""
        self.model = model
        self._write()

    def folder(self, round_index: int) -> Path:
        """Return where the files of a round are."""
        return self.root / f"round_{round_index:03d}"

    def path(self, relative: str) -> Path:
        """Return the path of a file that a record names."""
        return self.root / relative

    def relative(self, path: Path) -> str:
        """Return how a record names a file of the trajectory."""
        return path.relative_to(self.root).as_posix()

    def add_snapshot(
        self, round_index: int, state: Mapping[str, Tensor], file: str = "policy.safetensors"
    ) -> Record:
        """Write a policy's weights as the snapshot of a round.

        Args:
            round_index: 0 for the starting policy, t for the policy after round t.
            state: The weights; tensors must not share memory.
            file: Where below the round's folder.

        Returns:
            The record, with the path and hash of the file.
        """
        path = self.folder(round_index) / file
        tensors = {name: tensor.detach().contiguous().cpu() for name, tensor in state.items()}
        with replacing(path) as beside:
            save_file(tensors, beside, metadata={"format": "pt"})
        self._sources.pop(round_index, None)
        return self.update(round_index, snapshot=self.relative(path), sha256=file_sha256(path))

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
        write_text(self.manifest, json.dumps(content, indent=1) + "\n")

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

    def _read(self) -> None:
        way_out = "restore it or start over with --overwrite"
        try:
            content = json.loads(self.manifest.read_text(encoding="utf-8"))
            if content["version"] != VERSION:
                raise ValueError(f"version {content['version']}, known is {VERSION}")
            self.model = content["model"]
            for item in content["rounds"]:
                recipe, ship = item.pop("recipe"), item.pop("ship")
                # the record first: its own recipe's hash is made from its snapshot's
                record = Record(**item)
                self._records[record.round] = record
                self._records[record.round] = replace(
                    record,
                    recipe=None if recipe is None else self._recipe_from_json(recipe),
                    ship={name: self._recipe_from_json(r) for name, r in ship.items()},
                )
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            raise InputError(f"{self.manifest} cannot be read ({error!r}); {way_out}") from error
