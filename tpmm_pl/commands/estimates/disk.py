"""What a fit writes into its folder."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import PeftModel
from torch import Tensor, nn

from tpmm_pl.callbacks.model_export import ModelExport
from tpmm_pl.callbacks.reference_merge import ReferenceMerge
from tpmm_pl.callbacks.reward_export import RewardExport
from tpmm_pl.callbacks.round_checkpoint import FitCheckpoint
from tpmm_pl.callbacks.trajectory_snapshot import TrajectorySnapshot
from tpmm_pl.commands.estimates.memory import adapter_bytes, optimizer_bytes
from tpmm_pl.commands.estimates.table import Row, size
from tpmm_pl.commands.estimates.workload import Workload
from tpmm_pl.models.weights import policy_state
from tpmm_pl.modules.consolidation import ExpertFusion
from tpmm_pl.modules.fusion import FusionWeights
from tpmm_pl.moe.convert import expert_sources

_BYTES_A_TOKEN = 8
"""Of a pair on disk: a token's number and its text, before compression."""


@dataclass(frozen=True)
class Disk:
    """Bytes in the folder of a run when it is finished."""

    snapshot: int
    snapshots: int
    """How many."""
    checkpoint: int
    exports: Mapping[str, int]
    """By the folder's name."""
    pairs: int

    @property
    def total(self) -> int:
        """All of it."""
        of_models = self.snapshot * self.snapshots + sum(self.exports.values())
        return of_models + self.checkpoint + self.pairs

    @property
    def beside(self) -> int:
        """What is there twice for a moment: files are written beside and renamed."""
        return max([self.snapshot, self.checkpoint, *self.exports.values()])


def disk(
    model: nn.Module, module: Any, callbacks: Sequence[Any], work: Workload, tokenizer: int
) -> Disk:
    """Return what a fit writes.

    Args:
        model: On the ``meta`` device, in the dtype that is stored.
        module: Of the fit.
        callbacks: Of the trainer: what is written depends on who is there.
        work: Pairs and snapshots.
        tokenizer: Bytes of a tokenizer's files, which every export has.
    """
    kinds = {kind for callback in callbacks for kind in type(callback).__mro__}
    trained = [p for p in model.parameters() if p.requires_grad]
    checkpoint = 0
    if FitCheckpoint in kinds and not isinstance(module, FusionWeights):
        kept = trained if isinstance(model, PeftModel) else policy_state(model).values()
        checkpoint = _bytes(kept) + optimizer_bytes(module.make_optimizer, trained)
    snapshots = work.snapshots if TrajectorySnapshot in kinds else 0
    exports = _exports(model, module, callbacks, work)
    return Disk(
        snapshot=_bytes(policy_state(model).values()) if snapshots else 0,
        snapshots=snapshots,
        checkpoint=checkpoint,
        exports={name: weights + tokenizer for name, weights in exports.items()},
        pairs=_pairs(work) if work.snapshots else 0,
    )


def disk_rows(found: Disk, root: Path, *, there: int) -> tuple[list[Row], str | None]:
    """Return the rows of what is written, and a warning if the disk is too small.

    Args:
        found: What is written.
        root: Folder of the run.
        there: Bytes in it now that the fit goes on from or replaces.
    """
    free = shutil.disk_usage(next(p for p in (root, *root.absolute().parents) if p.exists())).free
    short = found.total - there + found.beside - free
    each = f"{found.snapshots} snapshots of {size(found.snapshot)}"
    twice = f"and {size(found.beside)} for a moment: files are written beside, then renamed"
    rows = [
        *(
            [Row(each, size(found.snapshots * found.snapshot), "counted")]
            if found.snapshots
            else []
        ),
        *(
            [Row("checkpoint", size(found.checkpoint), "counted, the optimizer's state in it")]
            if found.checkpoint
            else []
        ),
        *(Row(f"export/{name}", size(count), "counted") for name, count in found.exports.items()),
        *([Row("pairs", size(found.pairs), "estimated, not compressed")] if found.pairs else []),
        Row("= in the folder", size(found.total), twice),
        *([Row("already in the folder", size(there))] if there else []),
        Row("free on its disk", size(free), "now"),
    ]
    if short <= 0:
        return rows, None
    return rows, (
        f"the disk of {root} is short of {size(short)}; make room, or choose another"
        " trainer.default_root_dir"
    )


def folder_bytes(folder: Path) -> int:
    """Return the bytes of all files of a folder, 0 if there is none."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _exports(
    model: nn.Module, module: Any, callbacks: Sequence[Any], work: Workload
) -> dict[str, int]:
    if any(isinstance(callback, RewardExport) for callback in callbacks):
        whole = model.get_base_model() if isinstance(model, PeftModel) else model
        # a reward model's adapter is merged into it
        gone = _merged_experts(model) if isinstance(module, ExpertFusion) else 0
        stored = _bytes(policy_state(whole).values())
        return {"reward": stored - adapter_bytes(model) - gone}
    export = next((c for c in callbacks if isinstance(c, ModelExport)), None)
    if export is None:
        return {}
    one = _bytes(policy_state(model).values())
    merge = next((c for c in callbacks if isinstance(c, ReferenceMerge)), None)
    merged = {} if merge is None else {"merged": one * _ranks(model, export, merge, work)}
    return {"last": one, **merged, "best": one}


def _ranks(model: nn.Module, export: ModelExport, merge: ReferenceMerge, work: Workload) -> int:
    """Return how many adapters the merged one is as large as."""
    several = merge.strategy not in ("last", "initial") or merge.ship != "merge"
    if not isinstance(model, PeftModel) or export.adapter_rank != "exact" or not several:
        return 1
    return merge.window if merge.strategy == "window" else work.snapshots


def _merged_experts(model: nn.Module) -> int:
    """Return the bytes of all experts but one: as many are left when they are merged."""
    return sum(_bytes(expert.values()) for expert in expert_sources(model)[1:])


def _pairs(work: Workload) -> int:
    return _BYTES_A_TOKEN * (work.pairs.tokens * work.rounds + work.fuse.tokens)


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
