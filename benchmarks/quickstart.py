"""What the learned reference costs: rounds of the quickstart against iterative DPO.

    python benchmarks/quickstart.py --repeats 3 --whole

Runs the arms ``last`` and ``learned`` of ``configs/quickstart.yaml`` in turn, as processes of one
thread, and adds up the seconds that the manifests hold; their clock is the CPU time of the run, so
that other processes do not count. Evaluation and shipping are no part of a round. ``--whole`` also
times the quickstart as a newcomer meets it: its supervised start not yet cached, the figure drawn.
``--quick`` takes a small model and three rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping
from pathlib import Path

from page import write_section

from tpmm_pl.trajectory import Record, TrajectoryStore

ROOT = Path(__file__).resolve().parents[1]
STAGES = ("train", "snapshot", "fuse_pairs", "fuse", "pairs")
"""What a round is made of."""
BAR = 1.9
LIMIT = 300
"""Seconds the whole quickstart may take."""

ON_CPU_TIME = (
    "import time; time.perf_counter = time.process_time; from tpmm_pl.cli import main; main()"
)
"""The command line of `tpmm`, with stages timed by the CPU seconds of the process."""

QUICK = [
    "--model.policy.hidden", "32", "--model.policy.layers", "2", "--model.policy.steps", "150",
    "--model.rounds", "3", "--data.prompts_per_round", "48", "--data.evaluation_prompts", "64",
]  # fmt: skip


def fit(out: Path, arm: str, extra: list[str]) -> list[Record]:
    """Run an arm in one thread and return its records.

    Raises:
        SystemExit: If the run fails, with the end of its output.
    """
    command = [sys.executable, "-c", ON_CPU_TIME, "fit", "--config", "configs/quickstart.yaml"]
    command += ["--reference.strategy", arm, "--trainer.default_root_dir", str(out), *extra]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}: exit {done.returncode}\n{done.stderr[-2000:]}")
    return TrajectoryStore(out / "trajectory").rounds


def whole_seconds(folder: Path, extra: list[str]) -> tuple[float, float]:
    """Return wall and CPU seconds of the quickstart from an empty cache to its figure."""
    before, started = _children_cpu(), time.perf_counter()
    fit(folder / "whole", "learned", [*extra, "--model.policy.cache_dir", str(folder / "cache")])
    return time.perf_counter() - started, _children_cpu() - before


def _children_cpu() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def stage_seconds(records: Iterable[Record]) -> dict[str, float]:
    """Add up the seconds of every stage of a round over a run."""
    records = list(records)
    return {stage: sum(r.seconds.get(stage, 0.0) for r in records) for stage in STAGES}


def rounds_ratios(last: Mapping[str, float], learned: Mapping[str, float]) -> dict[str, float]:
    """Return how much longer the rounds with a learned reference take.

    Iterative DPO needs no held-out pairs: the bar is on the ratio that does not count them there.
    """
    ours, theirs = sum(learned.values()), sum(last.values())
    return {
        "rounds_learned_over_last": ours / (theirs - last["fuse_pairs"]),
        "rounds_learned_over_last_counting_its_fuse_pairs": ours / theirs,
    }


def table(runs: Mapping[str, list[dict[str, float]]], ratios: Mapping[str, float]) -> str:
    """Return Markdown; the unit of every stage is the rounds of ``last`` without fuse pairs."""
    means = {arm: _mean(of) for arm, of in runs.items()}
    unit = sum(means["last"].values()) - means["last"]["fuse_pairs"]
    lines = ["| stage, share of the rounds of `last` | last | learned |", "|---|---|---|"]
    for stage in STAGES:
        last, learned = (means[arm][stage] / unit for arm in ("last", "learned"))
        shown = f"({last:.2f})" if stage == "fuse_pairs" else f"{last:.2f}"
        lines.append(f"| {stage} | {shown} | {learned:.2f} |")
    lines += ["", "| ratio | value |", "|---|---|"]
    lines += [f"| {name} | {value:.2f} |" for name, value in ratios.items()]
    return "\n".join(lines)


def _mean(runs: list[dict[str, float]]) -> dict[str, float]:
    return {stage: statistics.mean(run[stage] for run in runs) for stage in STAGES}


def main() -> None:
    """Run both arms in turn and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--whole", action="store_true", help="also time a newcomer's quickstart")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--write", type=Path, help="a file with a section `quickstart`")
    options = parser.parse_args()
    extra = QUICK if options.quick else []
    runs: dict[str, list[dict[str, float]]] = {"last": [], "learned": []}
    settings = {"quick": options.quick, "repeats": options.repeats}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for repeat in range(options.repeats):
            # turn about: a machine that becomes slower does not favour an arm
            for arm in ("last", "learned")[:: -1 if repeat % 2 else 1]:
                records = fit(folder / f"{arm}_{repeat}", arm, extra)
                runs[arm].append(stage_seconds(records))
        several = [rounds_ratios(a, b) for a, b in zip(runs["last"], runs["learned"], strict=True)]
        ratios = {key: statistics.median(r[key] for r in several) for key in several[0]}
        text = table(runs, ratios) + f"\n\nThe bar of `rounds_learned_over_last` is {BAR}."
        if options.whole:
            wall, cpu = whole_seconds(folder, extra)
            ratios["whole_over_limit"] = wall / LIMIT
            text += (
                f"\nThe whole quickstart on one thread: {wall:.0f} seconds of wall time, "
                f"{cpu:.0f} of CPU time; the limit is {LIMIT}."
            )
    print(text)
    if options.json:
        content = {"ratios": ratios, "settings": settings}
        options.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    if options.write:
        write_section(options.write, "quickstart", text)


if __name__ == "__main__":
    main()
