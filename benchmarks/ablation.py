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

_RANKING = [
    "--reference.strategy", "learned", "--reference.next_policy", "last",
    "--reference.fusion.objective", "ranking",
]  # fmt: skip
GUARD_ARMS = {
    "ranking": _RANKING,
    "ranking_unguarded": [
        *_RANKING, "--reference.guard_kl", "null", "--reference.guard_weight", "null",
    ],
}  # fmt: skip
"""A learned reference that goes astray without the guard: ``--arms ranking,ranking_unguarded``."""

QUICK = [
    "--model.policy.hidden", "32", "--model.policy.layers", "2", "--model.policy.steps", "150",
    "--model.rounds", "3", "--data.prompts_per_round", "48", "--data.evaluation_prompts", "64",
]  # fmt: skip

Golds = list[list[float]]

COMPARISONS = [
    (("learned", "last"), ("last", "last")),
    (("learned", "last"), ("initial", "last")),
    (("learned", "last"), ("uniform", "last")),
    (("learned", "last"), ("control", "last")),
    (("last", "learned"), ("last", "average")),
    (("learned", "merge"), ("uniform", "average")),
    (("learned", "average"), ("uniform", "average")),
    (("learned", "learned"), ("uniform", "average")),
    (("uniform", "learned"), ("uniform", "average")),
    (("learned", "merge"), ("control", "average")),
    (("learned", "average"), ("control", "average")),
    (("uniform", "average"), ("control", "average")),
    (("ranking", "last"), ("ranking_unguarded", "last")),
]
"""Arm and what is shipped, against arm and what is shipped."""

COLUMNS = [(mode, domain) for mode in ("sampled", "greedy") for domain in ("in", "out_of")]


def run_one(arm: str, seed: int, overlay: Path | None, out: Path, extra: list[str]) -> int:
    """Run one arm with one seed, unless it is complete; return its exit code."""
    root = out / arm / f"seed_{seed}"
    overlays = ["--config", str(overlay)] if overlay else []
    command = [sys.executable, "-m", "tpmm_pl.cli", "fit", "--config", "configs/quickstart.yaml"]
    command += [*overlays, *(ARMS | GUARD_ARMS)[arm], "--seed_everything", str(seed), *extra]
    command += ["--trainer.default_root_dir", str(root), "--ckpt_path", "last"]
    root.mkdir(parents=True, exist_ok=True)
    with (root / "output.txt").open("a") as output:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, stdout=output, stderr=output, env=environment, check=False)
    print(f"{arm} seed {seed}: exit {done.returncode}", flush=True)
    return done.returncode


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


def shipped(out: Path, arms: list[str], seeds: list[int]) -> dict[tuple[str, str], Golds]:
    """Return gold scores by arm and what is shipped: one list over seeds a column."""
    found: dict[tuple[str, str], Golds] = {}
    for arm in arms:
        runs = [final(out, arm, seed) for seed in seeds]
        for what in ("last", "merge", "average", "learned"):
            columns = [[gold(run[-1], what, *column) for run in runs] for column in COLUMNS]
            if None not in columns[0]:
                found[arm, what] = [[v for v in column if v is not None] for column in columns]
    return found


def score_table(out: Path, found: dict[tuple[str, str], Golds], seeds: list[int]) -> str:
    """Return gold by arm and what is shipped, in Markdown, and each arm's late rounds."""
    lines = [
        "| arm, shipped | sampled in | sampled out | greedy in | greedy out | "
        "worst gold, last rounds | KL to start, nats | guard |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for (arm, what), columns in found.items():
        late = ["", "", ""]
        if what == "last":
            runs = [final(out, arm, seed) for seed in seeds]
            tails = [run[len(run) // 2 + 1 :] for run in runs]
            worst = [min(r.metrics["gold/in_domain"] for r in tail) for tail in tails]
            kl = [run[-1].metrics["kl/policy_sft/in_domain"] for run in runs]
            guards = sum("guard" in r.notes for run in runs for r in run)
            late = [spread(worst), spread(kl), f"{guards} rounds" if guards else ""]
        cells = [*(spread(column) for column in columns), *late]
        lines.append(f"| {arm}, {what} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def comparison_table(found: dict[tuple[str, str], Golds]) -> str:
    """Return paired differences over seeds, in Markdown."""
    lines = ["| paired difference, sampled gold in domain | mean, t, positive |", "|---|---|"]
    for name, ours, theirs in _pairs(found):
        lines.append(f"| {name} | {paired(ours, theirs)} |")
    return "\n".join(lines)


def _pairs(found: dict[tuple[str, str], Golds]) -> list[tuple[str, list[float], list[float]]]:
    return [
        (f"{a[0]}, {a[1]} against {b[0]}, {b[1]}", found[a][0], found[b][0])
        for a, b in COMPARISONS
        if a in found and b in found
    ]


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
        codes = list(pool.map(lambda job: run_one(*job, options.overlay, options.out, extra), jobs))
    failed = [f"{arm} seed {seed}" for (arm, seed), code in zip(jobs, codes, strict=True) if code]
    if failed:
        sys.exit(f"failed: {', '.join(failed)}; see output.txt in their folders")
    found = shipped(options.out, arms, seeds)
    print(score_table(options.out, found, seeds), comparison_table(found), sep="\n\n")
    if options.json:
        means = {n: statistics.mean(a) - statistics.mean(b) for n, a, b in _pairs(found)}
        settings = {"arms": arms, "seeds": seeds, "overlay": str(options.overlay)}
        options.json.write_text(json.dumps({"ratios": means, "settings": settings}, indent=1))


if __name__ == "__main__":
    main()
