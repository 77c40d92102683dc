"""Run folders written by hand: a manifest, a configuration, scores."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

from tpmm_pl.data.pairs import write_pairs
from tpmm_pl.report.arms import Arm, arms_of
from tpmm_pl.report.runs import read_runs
from tpmm_pl.rounds import fixed_recipe
from tpmm_pl.trajectory import TrajectoryStore
from tpmm_pl.types import Pair


def config(seed: int = 0, strategy: str = "last", **changes: Any) -> dict[str, Any]:
    """Return a configuration; ``changes`` are settings of the pairs."""
    return {
        "seed_everything": seed,
        "trainer": {"default_root_dir": f"runs/{strategy}/seed_{seed}", "devices": 1},
        "model": {"class_path": "DPOModule", "init_args": {"rounds": 2, "beta": 0.1}},
        "data": {"class_path": "tpmm_pl.toy.module.LettersData", "init_args": {"batch_size": 8}},
        "reference": {"class_path": "ReferenceMerge", "init_args": {"strategy": strategy}},
        "pairs": {"class_path": "OnPolicyPairs", "init_args": {"method": "random", **changes}},
        "overwrite": False,
    }


def write_run(
    folder: Path,
    settings: Mapping[str, Any] | None,
    metrics: Sequence[Mapping[str, float]],
    *,
    strategy: str = "uniform",
    pairs: Sequence[Pair] = (),
) -> Path:
    """Write a run with a round for every set of metrics, round 0 included."""
    store = TrajectoryStore(folder / "trajectory")
    for index, measured in enumerate(metrics):
        store.add_snapshot(index, {"weight": torch.full((2,), float(index))})
        store.update(
            index, recipe=fixed_recipe(strategy, index), metrics=dict(measured), seconds={"fit": 1}
        )
        if pairs:
            file = store.folder(index) / "pairs.parquet"
            digest = write_pairs(file, pairs)
            store.update(index, pairs=store.relative(file), pairs_sha256=digest)
    if settings is not None:
        (folder / "config.yaml").write_text(yaml.safe_dump(dict(settings)), encoding="utf-8")
    return folder


def gold(*values: float) -> list[dict[str, float]]:
    """Return metrics of rounds that have a gold score in domain and nothing else."""
    return [{"gold/in_domain": value} for value in values]


def drift(*values: float, proxy: float = 1.0) -> list[dict[str, float]]:
    """Return metrics of rounds with scores, win rates, length and a KL of 0, 1, 2, ... nats."""
    found = []
    for index, value in enumerate(values):
        measured = {
            "gold/in_domain": value,
            "proxy/in_domain": proxy * index,
            "kl/policy_sft/in_domain": float(index),
            "length/in_domain": 5.0 + index,
        }
        if index:
            measured |= {"win/sft/in_domain": 0.4, "win/sft_low/in_domain": 0.3}
            measured |= {"win/sft_high/in_domain": 0.5, "accuracy/in_domain": 0.6}
        found.append(measured)
    return found


def write_scores(folder: Path, round_index: int, scores: Sequence[float]) -> None:
    """Write the gold scores of single answers in domain."""
    file = folder / "trajectory" / f"round_{round_index:03d}" / "scores.json"
    file.write_text(json.dumps({"in_domain": {"gold": list(scores)}}), encoding="utf-8")


def arms(*folders: Path) -> list[Arm]:
    return arms_of(read_runs(folders))


def pair(prompt_id: str, prompt: str, chosen: str, rejected: str, **changes: Any) -> Pair:
    return Pair(prompt_id, prompt, chosen, rejected, (1,), (2,), (3,), **changes)
