"""Arms x seeds of the letters task: gold of the last policy and of what may be shipped.

    python benchmarks/ablation.py --overlay configs/overlays/quickstart_hard.yaml --out runs/hard

Runs are separate processes of one thread, as many at a time as there are cores; a run that is
complete is not run again. ``--quick`` takes two arms, two seeds and a small model.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tpmm_pl.trajectory import Record, TrajectoryStore

ARMS = {
    "last": ["--reference.strategy", "last"],
    "initial": ["--reference.strategy", "initial"],
    "uniform": ["--reference.strategy", "uniform"],
    "learned": ["--reference.strategy", "learned"],
    "control": ["--reference.strategy", "initial", "--pairs.train_on_fuse_pairs", "true"],
}
"""``control``: a fixed reference that also trains on the fuse pairs."""

QUICK = [
    "--model.policy.hidden", "32", "--model.policy.layers", "2", "--model.policy.steps", "150",
    "--model.rounds", "3", "--data.prompts_per_round", "48", "--data.evaluation_prompts", "64",
]  # fmt: skip

COLUMNS = [(mode, domain) for mode in ("sampled", "greedy") for domain in ("in", "out_of")]


def run_one(arm: str, seed: int, overlay: Path | None, out: Path, extra: list[str]) -> None:
    """Run one arm with one seed, unless it is complete."""
    root = out / arm / f"seed_{seed}"
    overlays = ["--config", str(overlay)] if overlay else []
    command = [sys.executable, "-m", "tpmm_pl.cli", "fit", "--config", "configs/quickstart.yaml"]
    command += [*overlays, *ARMS[arm], "--seed_everything", str(seed), *extra]
    command += ["--trainer.default_root_dir", str(root), "--ckpt_path", "last"]
    root.mkdir(parents=True, exist_ok=True)
    with (root / "output.txt").open("a") as output:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, stdout=output, stderr=output, env=environment, check=False)
    print(f"{arm} seed {seed}: exit {done.returncode}", flush=True)


def final(out: Path, arm: str, seed: int) -> list[Record]:
    """Return the records of a run."""
    return TrajectoryStore(out / arm / f"seed_{seed}" / "trajectory").rounds


def gold(record: Record, what: str, mode: str, domain: str) -> float | None:
    """Return the gold score of what may be shipped."""
    return record.metrics.get(f"ship/{what}/{mode}/gold/{domain}_domain")


def spread(values: list[float]) -> str:
    """Return mean and standard deviation."""
    deviation = statistics.stdev(values) if len(values) > 1 else float("nan")
    return f"{statistics.mean(values):.3f} +- {deviation:.3f}"


def paired(ours: list[float], theirs: list[float]) -> str:
    """Return the mean of paired differences, its t and how many are positive."""
    differences = [a - b for a, b in zip(ours, theirs, strict=True)]
    mean = statistics.mean(differences)
    positive = sum(d > 0 for d in differences)
    if len(differences) < 2 or not (deviation := statistics.stdev(differences)):
        return f"{mean:+.3f} ({positive} of {len(differences)})"
    t = mean / (deviation / len(differences) ** 0.5)
    return f"{mean:+.3f}, t = {t:.1f} ({positive} of {len(differences)})"


def table(out: Path, arms: list[str], seeds: list[int]) -> str:
    """Return the tables in Markdown."""
    lines = [
        "| arm, shipped | sampled in | sampled out | greedy in | greedy out | "
        "worst gold, last rounds | KL to start, nats | guard |",
        "|---|---|---|---|---|---|---|---|",
    ]
    found: dict[tuple[str, str], list[float]] = {}
    for arm in arms:
        runs = [final(out, arm, seed) for seed in seeds]
        for what in ("last", "merge", "average", "learned"):
            by_column = [[gold(run[-1], what, *c) for run in runs] for c in COLUMNS]
            if None in by_column[0]:
                continue
            known = [[v for v in column if v is not None] for column in by_column]
            found[arm, what] = known[0]
            cells = [spread(column) for column in known]
            extra = ["", "", ""]
            if what == "last":
                late = [run[len(run) // 2 + 1 :] for run in runs]
                worst = [min(r.metrics["gold/in_domain"] for r in rounds) for rounds in late]
                kl = [run[-1].metrics["kl/policy_sft/in_domain"] for run in runs]
                guards = sum("guard" in r.notes for run in runs for r in run)
                extra = [spread(worst), spread(kl), f"{guards} rounds" if guards else ""]
            lines.append(f"| {arm}, {what} | " + " | ".join([*cells, *extra]) + " |")
    lines += [
        "",
        "| paired difference of sampled gold in domain | mean, t, positive |",
        "|---|---|",
    ]
    comparisons = [
        (("learned", "last"), ("last", "last")),
        (("learned", "last"), ("initial", "last")),
        (("learned", "last"), ("uniform", "last")),
        (("learned", "last"), ("control", "last")),
        (("learned", "merge"), ("uniform", "average")),
        (("learned", "average"), ("uniform", "average")),
        (("learned", "learned"), ("uniform", "average")),
        (("uniform", "learned"), ("uniform", "average")),
        (("learned", "merge"), ("control", "average")),
        (("learned", "average"), ("control", "average")),
        (("uniform", "average"), ("control", "average")),
    ]
    for ours, theirs in comparisons:
        if ours in found and theirs in found:
            name = f"{ours[0]}, {ours[1]} against {theirs[0]}, {theirs[1]}"
            lines.append(f"| {name} | {paired(found[ours], found[theirs])} |")
    return "\n".join(lines)


def main() -> None:
    """Run what is missing and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--overlay", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--arms", default=",".join(ARMS))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    arms: list[str] = ["last", "learned"] if options.quick else options.arms.split(",")
    seeds = list(range(2 if options.quick else options.seeds))
    extra = QUICK if options.quick else []
    with ThreadPoolExecutor(options.jobs) as pool:
        jobs = [(arm, seed) for seed in seeds for arm in arms]
        list(pool.map(lambda job: run_one(*job, options.overlay, options.out, extra), jobs))
    print(table(options.out, arms, seeds))
    if options.json:
        golds = {
            f"{arm}/{seed}": final(options.out, arm, seed)[-1].metrics
            for arm in arms
            for seed in seeds
        }
        settings = {"arms": arms, "seeds": seeds, "overlay": str(options.overlay)}
        options.json.write_text(json.dumps({"ratios": golds, "settings": settings}, indent=1))


if __name__ == "__main__":
    main()
