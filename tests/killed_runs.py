"""Small runs of `tpmm fit` that are killed and resumed, and compared with unbroken ones."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import yaml

from tpmm_pl.trajectory import TrajectoryStore

ROUNDS = 3
SIGKILLED = -9


@dataclass(frozen=True)
class Ended:
    """How a run ended: its exit code, negative for a signal, and its processor time."""

    code: int
    seconds: float


class Runs:
    """Runs of one configuration below a folder, started by one warm process.

    Args:
        folder: Has the runs, the start they share, and what they print.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.config = folder / "letters.yaml"
        self.config.write_text(yaml.safe_dump(_config(folder / "start")))

    def __enter__(self) -> Runs:
        driver = Path(__file__).with_name("fork_driver.py")
        quiet = {"OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg", "TQDM_DISABLE": "1"}
        quiet["JSONARGPARSE_DEPRECATION_WARNINGS"] = "off"
        self._driver = subprocess.Popen(
            [sys.executable, str(driver)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **quiet},
        )
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        assert self._driver.stdin is not None
        self._driver.stdin.close()
        self._driver.wait()

    def fit(
        self,
        name: str,
        *flags: str,
        seconds: float | None = None,
        strike: dict[str, Any] | None = None,
        environment: dict[str, str] | None = None,
    ) -> Ended:
        """Start a run, or with ``--ckpt_path last`` go on with it; wait for its end.

        Args:
            name: Its folder.
            flags: Of the command line.
            seconds: Of processor time after which SIGKILL ends it.
            strike: A point inside; see ``fork_driver``.
            environment: Variables to add.
        """
        root = self.root(name)
        root.parent.mkdir(exist_ok=True)
        argv = ["fit", "--config", str(self.config), "--trainer.default_root_dir", str(root)]
        request: dict[str, Any] = {"argv": [*argv, *flags], "seconds": seconds, "strike": strike}
        request["environment"] = environment
        request |= {"log": str(self.log(name)), "seen": str(self._seen(name))}
        with self._seen(name).open("a") as opened:
            opened.write("start\n")
        assert self._driver.stdin is not None
        assert self._driver.stdout is not None
        self._driver.stdin.write(json.dumps(request) + "\n")
        self._driver.stdin.flush()
        answer: dict[str, float] = json.loads(self._driver.stdout.readline())
        return Ended(int(answer["code"]), answer["seconds"])

    def resume(self, name: str, *flags: str, **how: Any) -> Ended:
        """Go on with a run."""
        return self.fit(name, "--ckpt_path", "last", *flags, **how)

    def root(self, name: str) -> Path:
        """Return the folder of a run; no other is beside it, so that no cache is shared."""
        return self.folder / name / "run"

    def log(self, name: str) -> Path:
        """Return the file of what a run has printed."""
        return self.folder / name / "log"

    def starts(self, name: str) -> list[list[tuple[int, int, str]]]:
        """Return the batches of each start of a run: epoch, number, hash of the tokens."""
        starts: list[list[tuple[int, int, str]]] = []
        for line in self._seen(name).read_text().splitlines():
            if line == "start":
                starts.append([])
            else:
                epoch, number, tokens = line.split()
                starts[-1].append((int(epoch), int(number), tokens))
        return starts

    def _seen(self, name: str) -> Path:
        return self.folder / name / "seen"


def differences(runs: Runs, name: str, unbroken: str) -> list[str]:
    """Return in what a run that was broken differs from one that was not."""
    found = []
    stores = [TrajectoryStore(runs.root(n) / "trajectory") for n in (name, unbroken)]
    ours, theirs = (store.rounds for store in stores)
    if [r.round for r in ours] != [r.round for r in theirs]:
        return [f"rounds {[r.round for r in ours]}, not {[r.round for r in theirs]}"]
    for record, other in zip(ours, theirs, strict=True):
        parts = ("sha256", "recipe", "ship", "metrics")
        wrong = [part for part in parts if getattr(record, part) != getattr(other, part)]
        tensors = stores[1].source(record.round)
        ours_of = stores[0].source(record.round)
        wrong += [key for key, tensor in ours_of.items() if not torch.equal(tensor, tensors[key])]
        # how long it has trained is known of the start that ended the round
        if {*record.seconds, "train"} != {*other.seconds, "train"}:
            wrong.append("stages")
        found += [f"{part} of round {record.round}" for part in wrong]
    return [*found, *_files(runs, name, unbroken), *wrong_batches(runs, name, unbroken)]


def wrong_batches(runs: Runs, name: str, unbroken: str) -> list[str]:
    """Return which start of a run repeats or skips a batch, or sees another than the unbroken."""
    (whole,) = runs.starts(unbroken)
    found, reached = [], 0
    for number, seen in enumerate(runs.starts(name)):
        if not seen:
            continue
        first = whole.index(seen[0]) if seen[0] in whole else -1
        if first < 0 or whole[first : first + len(seen)] != seen or first > reached:
            found.append(f"batches of start {number}")
        reached = first + len(seen)
    return found if reached == len(whole) else [*found, "batches at the end"]


def leftovers(root: Path) -> list[Path]:
    """Return what a writer that was killed has left beside its place."""
    hidden = [path for path in root.rglob(".*") if path.name.split(".")[-1].isdigit()]
    return [*hidden, *(path for path in root.rglob(".*.old"))]


def _files(runs: Runs, name: str, unbroken: str) -> list[str]:
    roots = [runs.root(n) for n in (name, unbroken)]
    kept: list[set[Path]] = []
    for root in roots:
        files = (path.relative_to(root) for path in root.rglob("*") if path.is_file())
        kept.append({path for path in files if path.parts[0] != "tensorboard"})
    found = [f"file {path}" for path in sorted(kept[0] ^ kept[1])]
    for path in sorted(kept[0] & kept[1]):
        weights = path.suffix in (".safetensors", ".parquet")
        if weights and (roots[0] / path).read_bytes() != (roots[1] / path).read_bytes():
            found.append(f"content of {path}")
    return found


def strike(signal: str, **where: Any) -> dict[str, Any]:
    """Return a point inside a run at which a signal strikes it."""
    return {"signal": signal, **where}


def _config(start: Path) -> dict[str, Any]:
    def made(path: str, **settings: Any) -> dict[str, Any]:
        return {"class_path": path, "init_args": settings}

    proxy = made("tpmm_pl.toy.judges.LettersProxy")
    small = {"hidden": 16, "layers": 2, "heads": 2, "ffn": 32, "steps": 30, "batch_size": 16}
    fusion = {"steps": 4, "batch_size": 8}
    policy = made("tpmm_pl.toy.start.LettersPolicy", **small, cache_dir=str(start))
    optimizer = made("torch.optim.AdamW", lr=1e-3, fused=True)
    return {
        "seed_everything": 3,
        "trainer": {"accelerator": "cpu", "devices": 1},
        "model": made(
            "tpmm_pl.modules.dpo.DPOModule",
            policy=policy,
            optimizer=optimizer,
            rounds=ROUNDS,
            schedule="cosine",
        ),
        "data": made(
            "tpmm_pl.toy.module.LettersData",
            batch_size=8,
            prompts_per_round=16,
            start_fuse_prompts=8,
            fuse_prompts_per_round=8,
            evaluation_prompts=4,
        ),
        "snapshot": made("tpmm_pl.callbacks.TrajectorySnapshot"),
        "reference": made(
            "tpmm_pl.callbacks.ReferenceMerge",
            strategy="learned",
            fusion=fusion,
            guard_kl=None,
            ship_steps=4,
        ),
        "pairs": made(
            "tpmm_pl.callbacks.OnPolicyPairs",
            annotator=proxy,
            method="adjacent",
            samples=4,
            max_new_tokens=6,
            noise={"temperature": 0.1, "flip": 0.2},
        ),
        "evaluation": made(
            "tpmm_pl.callbacks.RoundEvaluation",
            gold=made("tpmm_pl.toy.judges.LettersGold"),
            proxy=proxy,
            max_new_tokens=6,
        ),
        "export": made("tpmm_pl.callbacks.ModelExport"),
        "checkpoint": made("tpmm_pl.callbacks.RoundCheckpoint", every_n_steps=2),
    }
