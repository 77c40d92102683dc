"""What a merge costs and how far it is from mergekit's, side by side.

    python benchmarks/merge.py

Four checkpoints of a random Llama are merged by ``tpmm merge`` and by mergekit, each in fresh
processes that do nothing else, in turns. CPU seconds are of the merge, its imports apart; the peak
of private memory is of the whole process, and what the merge added to it: mapped files do not
count. The largest difference of any weight is taken from the written folders. The model has the
shape of SmolLM2-135M, ``--quick`` a smaller one.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from page import PeakOfMemory, markdown, write_section
from safetensors import safe_open

BAR = 1.3
"""Models of private memory that a merge of any number of them may take."""

WEIGHTS = (0.1, 0.2, 0.3, 0.4)


class Case(NamedTuple):
    """One merge in the words of both programs."""

    models: int
    ours: dict[str, Any]
    """Settings of ``tpmm merge``."""
    method: str
    """Of mergekit."""
    settings: dict[str, Any]
    each: tuple[dict[str, Any], ...]
    """Its settings of each model."""
    base: bool = False
    """Whether the first model is its base."""


CASES = {
    "average": Case(4, {}, "linear", {}, ({"weight": 1.0},) * 4),
    "weighted": Case(
        4,
        {"weights": ",".join(map(str, WEIGHTS))},
        "linear",
        {"normalize": False},
        tuple({"weight": weight} for weight in WEIGHTS),
    ),
    "slerp": Case(2, {"method": "slerp", "t": 0.3}, "slerp", {"t": 0.3}, ({}, {}), base=True),
    "ties": Case(
        4,
        {"method": "ties", "density": 0.5},
        "ties",
        {"normalize": True},
        ({}, *({"weight": 1.0, "density": 0.5},) * 3),
        base=True,
    ),
}


class Spent(NamedTuple):
    """What a merge took."""

    seconds: float
    """CPU seconds."""
    peak: int
    """Largest private memory of the process in bytes."""
    added: int
    """The same without what was there before the merge."""


def write_checkpoints(root: Path, count: int, shape: Any) -> int:
    """Write a model and others a tenth of a weight's spread apart; return the bytes of one."""
    # here, not above: processes that are measured pay for their own imports only
    from fusion import random_llama

    model = random_llama(shape)
    generator = torch.Generator().manual_seed(1)
    for index in range(count):
        model.save_pretrained(root / f"model_{index}")
        for parameter in model.parameters():
            parameter.data.add_(torch.randn(parameter.shape, generator=generator), alpha=0.002)
    return sum(4 * parameter.numel() for parameter in model.parameters())


def merge_ours(case: Case, sources: Sequence[Path], out: Path) -> Spent:
    """Merge as ``tpmm merge`` does."""
    from tpmm_pl.commands.merge import merge_models

    return measured(lambda: merge_models([*map(str, sources)], out, **case.ours, json=True))


def merge_mergekit(case: Case, sources: Sequence[Path], out: Path) -> Spent:
    """Merge as ``mergekit-yaml`` does."""
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    config = MergeConfiguration.model_validate(mergekit_config(case, sources))
    options = MergeOptions(copy_tokenizer=False, quiet=True)
    return measured(lambda: run_merge(config, str(out), options))


def mergekit_config(case: Case, sources: Sequence[Path]) -> dict[str, Any]:
    """Return a merge in mergekit's own form."""
    models = [
        {"model": str(source), "parameters": each}
        for source, each in zip(sources, case.each, strict=True)
    ]
    base = {"base_model": str(sources[0])} if case.base else {}
    if case.method == "ties":
        del models[0]
    return {"merge_method": case.method, "models": models, "parameters": case.settings, **base,
            "dtype": "float32"}  # fmt: skip


WAYS = {"tpmm": merge_ours, "mergekit": merge_mergekit}


def measured(merge: Any) -> Spent:
    """Run a merge and say what it took."""
    started = time.process_time()
    with PeakOfMemory() as memory:
        merge()
    return Spent(time.process_time() - started, memory.peak, memory.peak - memory.start)


def in_fresh_process(way: str, name: str, root: Path) -> Spent:
    """Return what a merge took in a process that does nothing else."""
    command = [sys.executable, __file__, "--child", way, name, str(root)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return Spent(*json.loads(done.stdout.splitlines()[-1]))


def child(way: str, name: str, root: Path) -> Spent:
    """Merge in this process."""
    case = CASES[name]
    sources = [root / f"model_{index}" for index in range(case.models)]
    return WAYS[way](case, sources, out_folder(root, way, name))


def out_folder(root: Path, way: str, name: str) -> Path:
    """Return where a merge is written."""
    return root / f"{name}_{way}"


def differences(one: Path, other: Path) -> tuple[float, int]:
    """Return the largest difference of two folders' weights, and how many weights differ."""
    largest, odd = 0.0, 0
    with (
        safe_open(one / "model.safetensors", "pt") as ours,
        safe_open(weights_file(other), "pt") as theirs,
    ):
        if missing := set(ours.keys()) ^ set(theirs.keys()):
            raise ValueError(f"{one} and {other} differ in {sorted(missing)}")
        for name in ours.keys():  # noqa: SIM118 - no mapping
            a, b = ours.get_tensor(name), theirs.get_tensor(name)
            largest = max(largest, float((a - b).abs().max()))
            odd += int((a != b).sum())
    return largest, odd


def weights_file(folder: Path) -> Path:
    """Return the one file of weights of a folder."""
    (found,) = folder.glob("model*.safetensors")
    return found


def compare(name: str, root: Path, size: int, repeats: int) -> tuple[list[str], dict[str, float]]:
    """Return the row of a merge, and its ratios."""
    spent: dict[str, list[Spent]] = {way: [] for way in WAYS}
    found = (0.0, 0)
    for turn in range(repeats):
        for way in list(WAYS)[:: 1 if turn % 2 else -1]:
            # what a merge wrote before is taken away: it would be replaced at a price
            spent[way].append(in_fresh_process(way, name, root))
        folders = [out_folder(root, way, name) for way in WAYS]
        found = differences(*folders)
        for folder in folders:
            for file in folder.iterdir():
                file.unlink()
            folder.rmdir()
    ours, theirs = spent["tpmm"], spent["mergekit"]
    # the largest of several: a sampler can miss a peak, not invent one
    peaks = [max(one.peak for one in of) / size for of in (ours, theirs)]
    added = [max(one.added for one in of) / size for of in (ours, theirs)]
    seconds = [b.seconds / a.seconds for a, b in zip(ours, theirs, strict=True)]
    ratios = {
        f"{name}_max_difference": found[0],
        f"{name}_weights_that_differ": float(found[1]),
        f"{name}_peak_in_models": peaks[0],
        f"{name}_added_in_models": added[0],
        f"{name}_mergekit_peak_in_models": peaks[1],
        f"{name}_mergekit_seconds_over_ours": statistics.median(seconds),
    }
    bar = f"at most {BAR}: {'met' if added[0] <= BAR else 'NOT MET'}"
    cells = [
        f"{name}, {CASES[name].models} models",
        f"{found[0]:.0e} ({found[1]} weights)" if found[1] else "none",
        f"{added[0]:.2f}", f"{added[1]:.2f}", f"{peaks[0]:.2f}", f"{peaks[1]:.2f}",
        f"{statistics.median(seconds):.2f}", bar,
    ]  # fmt: skip
    return cells, ratios


HEADER = (
    "merge", "largest difference", "memory added, ours", "mergekit", "peak, ours", "mergekit",
    "CPU time, mergekit / ours", "bar of memory added",
)  # fmt: skip


def table(rows: list[list[str]], size: int, repeats: int) -> str:
    """Return what the page shows."""
    return markdown(HEADER, rows) + (
        f"\n\nmergekit {version('mergekit')}; checkpoints of {size / 4e6:.0f} million float32"
        f" parameters, {repeats} fresh processes a way in turns, one thread; private memory in"
        " models, the largest; CPU seconds of the merge without imports, medians. Ours are hashed"
        " while they are written."
    )


def main() -> None:
    """Print the table; write what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a smaller model")
    parser.add_argument("--merges", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--repeats", type=int, default=3, help="processes a way and merge")
    parser.add_argument("--json", type=Path, help="file for the ratios")
    parser.add_argument("--write", type=Path, help="page with a section merge or merge_quick")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.child:
        way, name, folder = options.child
        print(json.dumps(child(way, name, Path(folder))))
        return
    from fusion import FULL, SMALL

    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        size = write_checkpoints(root, 4, SMALL if options.quick else FULL)
        rows, ratios = [], {}
        for name in options.merges:
            cells, of_merge = compare(name, root, size, options.repeats)
            rows.append(cells)
            ratios |= of_merge
    text = table(rows, size, options.repeats)
    print(text, flush=True)
    if options.write:
        write_section(options.write, "merge_quick" if options.quick else "merge", text)
    if options.json:
        settings = {"quick": options.quick, "repeats": options.repeats, "bytes": size}
        settings |= {name: version(name) for name in ("torch", "mergekit", "transformers")}
        content = {"ratios": ratios, "settings": settings}
        options.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
