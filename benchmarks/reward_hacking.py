"""Reward models under optimisation pressure: dense, ensembles, experts, consolidated.

    python benchmarks/reward_hacking.py --out runs/hacking --write docs

A seed trains the reward models of the letters task by the configs of this repository, then measures
each: pairwise accuracy against the gold rule, gold score of the best of n answers of the supervised
start, and gold score of a policy optimised against it (iterative DPO without a fixed reference,
which goes far; nothing but the reward model labels its pairs). Runs are processes of one thread,
as many at a time as there are cores; what is complete is not run again. ``--biases`` gives the
annotators, one a family of tasks in turn. ``--quick`` takes one seed, few pairs and three rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from tpmm_pl.judges import RewardEnsembleJudge, RewardModelJudge
from tpmm_pl.noise import LabelNoise
from tpmm_pl.rollouts import sample_completions
from tpmm_pl.stats import best_of_n, best_of_n_kl
from tpmm_pl.toy.judges import LettersGold
from tpmm_pl.toy.prompts import eval_prompts
from tpmm_pl.toy.rewards import answer_pairs
from tpmm_pl.toy.start import LettersPolicy
from tpmm_pl.trajectory import TrajectoryStore
from tpmm_pl.types import Completion, Judge, Pair, Prompt

NS = (1, 2, 4, 8, 16, 32, 64)
DOMAINS = ("in_domain", "out_of_domain")
MEMBERS = ("dense", "member_1", "member_2", "member_3")
ARMS = (
    "dense",
    "dense_longer",
    "experts",
    "experts_unnormalised",
    "merge_uniform",
    "merge_unshared",
    "merge_learned",
    "ensemble_mean",
    "ensemble_worst",
    "ensemble_penalised",
    "ensemble_weights",
)
"""``merge_unshared`` is the plain average of the normal experts; the shared one is left out."""
QUICK_DATA = ["--data.pairs", "1024", "--data.evaluation_pairs", "128"]
QUICK_POLICY = ["--model.rounds", "3", "--data.prompts_per_round", "48"]


class Training(NamedTuple):
    """A reward model to train: its config, the arm it goes on from, and further flags."""

    arm: str
    config: str
    start: str | None = None
    flags: tuple[str, ...] = ()


def trainings(options: argparse.Namespace) -> list[list[Training]]:
    """Return what the chosen arms need trained, in waves that need those before."""
    afresh = ("--model.reward.moe.reinitialise", str(options.reinitialise))
    members = [
        Training(name, "reward_dense", None, ("--model.reward.seed", str(number)))
        for number, name in enumerate(MEMBERS)
    ]
    second = [
        Training("dense_longer", "reward_dense", "dense"),
        Training("experts", "reward_moe", "dense", afresh),
        Training(
            "experts_unnormalised", "reward_moe", "dense",
            ("--model.reward.moe.normalise", "false", *afresh),
        ),
    ]  # fmt: skip
    if options.from_start:
        settings = {"experts": 8, "active": 6, "reinitialise": options.reinitialise}
        second[1:] = [
            Training(
                arm, "reward_dense", None,
                ("--model.reward.moe", json.dumps(settings | {"normalise": normalise})),
            )
            for arm, normalise in (("experts", True), ("experts_unnormalised", False))
        ]  # fmt: skip
    third = [Training("merge_learned", "reward_consolidate", "experts")]
    needed = set(options.arms) | {"dense", "experts"}
    if any(arm.startswith("ensemble") for arm in options.arms):
        needed |= set(MEMBERS)
    return [[one for one in wave if one.arm in needed] for wave in (members, second, third)]


def judge_settings(root: Path) -> dict[str, tuple[str, dict[str, object]]]:
    """Return class and settings of every arm's judge, as a config has them."""
    members = [str(folder(root, name)) for name in MEMBERS]
    found: dict[str, tuple[str, dict[str, object]]] = {
        arm: ("RewardModelJudge", {"name_or_path": str(folder(root, arm))})
        for arm in ARMS
        if not arm.startswith("ensemble")
    }
    for combine in ("mean", "worst", "penalised", "weights"):
        settings = {"names_or_paths": members, "combine": combine}
        found[f"ensemble_{combine}"] = ("RewardEnsembleJudge", settings)
    return found


def folder(root: Path, arm: str) -> Path:
    """Return where the reward model of an arm lies."""
    return root / arm / "export" / "reward"


def tpmm(arguments: list[str], output: Path) -> None:
    """Run a command of `tpmm` in one thread.

    Raises:
        SystemExit: If it fails.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tpmm_pl.cli", *arguments]
    with output.open("a") as opened:
        done = subprocess.run(command, stdout=opened, stderr=opened, env=environment, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(arguments)}: exit {done.returncode}; see {output}")


def train(root: Path, seed: int, one: Training, options: argparse.Namespace) -> None:
    """Train a reward model, unless it is there."""
    out = root / one.arm
    arguments = ["fit", "--config", f"configs/{one.config}.yaml", "--ckpt_path", "last"]
    arguments += ["--trainer.default_root_dir", str(out), "--seed_everything", str(seed)]
    if one.start is not None:
        if one.config == "reward_dense":
            arguments += ["--model.reward", "tpmm_pl.models.reward.PretrainedReward"]
        arguments += ["--model.reward.name_or_path", str(folder(root, one.start))]
    biases = {
        "class_path": "tpmm_pl.toy.judges.LettersProxy",
        "init_args": {"bias": options.biases},
    }
    arguments += ["--data.annotator", json.dumps(biases), *one.flags]
    if one.config != "reward_consolidate":
        arguments += [
            "--data.pairs",
            str(options.pairs),
            "--trainer.max_epochs",
            str(options.epochs),
        ]
    arguments += QUICK_DATA if options.quick else []
    tpmm(arguments, out / "output.txt")


def merge_uniformly(root: Path) -> None:
    """Consolidate the experts by plain averages, unless it is done."""
    for arm, coefficient in (("merge_uniform", "0.5"), ("merge_unshared", "0.0")):
        out = folder(root, arm)
        if not out.exists():
            arguments = ["consolidate", str(folder(root, "experts")), "--out", str(out)]
            arguments += ["--shared-coefficient", coefficient]
            tpmm(arguments, root / arm / "output.txt")


def optimise(root: Path, seed: int, arm: str, options: argparse.Namespace) -> None:
    """Optimise a policy against the reward model of an arm, unless it is done."""
    name, settings = judge_settings(root)[arm]
    judge = json.dumps({"class_path": f"tpmm_pl.judges.{name}", "init_args": settings})
    out = root / "policies" / arm
    arguments = ["fit", "--config", "configs/quickstart.yaml", "--ckpt_path", "last"]
    arguments += ["--reference.strategy", "last", "--reference.ship_steps", "0"]
    arguments += ["--trainer.default_root_dir", str(out), "--seed_everything", str(seed)]
    arguments += ["--pairs.annotator", judge, "--evaluation.proxy", judge]
    arguments += ["--pairs.noise", '{"temperature": 0.0, "flip": 0.0}']
    tpmm(arguments + (QUICK_POLICY if options.quick else []), out / "output.txt")


def sampled(prompts: int) -> list[Completion]:
    """Return the start's answers that best-of-n chooses from, prompt by prompt."""
    start = LettersPolicy()
    start.prepare()
    tokenizer = start.load_tokenizer()
    asked = eval_prompts("in_domain", 0, prompts, tokenizer)
    return sample_completions(
        start.load_model().eval(), tokenizer, asked, samples=max(NS), max_new_tokens=12,
        key="best_of_n", batch_size=2048,
    )  # fmt: skip


def accuracy(judge: Judge, pairs: Sequence[Pair]) -> float:
    """Return the share of gold-labelled pairs that a judge orders the same way."""
    chosen = judge([_answer(p, p.chosen, p.chosen_ids) for p in pairs])
    rejected = judge([_answer(p, p.rejected, p.rejected_ids) for p in pairs])
    return statistics.mean(a > b for a, b in zip(chosen, rejected, strict=True))


def _answer(pair: Pair, text: str, ids: tuple[int, ...]) -> Completion:
    return Completion(Prompt(pair.prompt_id, pair.prompt, pair.prompt_ids), 0, ids, text, True, 0.0)


def measure(root: Path, arms: list[str], answers: list[Completion], evaluation_pairs: int) -> None:
    """Write accuracy and best-of-n of every arm, unless it is there."""
    gold = torch.tensor(LettersGold()(answers)).view(-1, max(NS))
    for arm in arms:
        name, settings = judge_settings(root)[arm]
        out = root / "measured" / f"{arm}.json"
        if out.exists():
            continue
        kinds = {"RewardModelJudge": RewardModelJudge, "RewardEnsembleJudge": RewardEnsembleJudge}
        judge: Judge = kinds[name](**settings)  # type: ignore[arg-type]
        found = {
            f"accuracy/{domain}": accuracy(
                judge,
                answer_pairs(
                    "benchmark", domain, "eval", evaluation_pairs, LettersGold(), LabelNoise()
                ),
            )
            for domain in DOMAINS
        }
        proxy = torch.tensor(judge(answers)).view(-1, max(NS))
        found |= {f"best_of/{n}": float(best_of_n(proxy, gold, n).mean()) for n in NS}
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(found))


def results(root: Path, arm: str) -> dict[str, float]:
    """Return what was measured of an arm in one seed, the policy's rounds included."""
    found: dict[str, float] = json.loads((root / "measured" / f"{arm}.json").read_text())
    rounds = TrajectoryStore(root / "policies" / arm / "trajectory").rounds
    for record in rounds:
        for name in ("gold/in_domain", "proxy/in_domain", "kl/policy_sft/in_domain"):
            found[f"{name}/{record.round}"] = record.metrics.get(name, 0.0)
    if rounds:
        golds = [r.metrics["gold/in_domain"] for r in rounds]
        found |= {"gold/start": golds[0], "gold/best": max(golds), "gold/last": golds[-1]}
        found["gold/mean"] = statistics.mean(golds[1:])
        proxies = [r.metrics["proxy/in_domain"] for r in rounds]
        found["proxy/gain"] = proxies[-1] - proxies[0]
        found["kl/last"] = rounds[-1].metrics["kl/policy_sft/in_domain"]
    return found


COLUMNS = {
    "accuracy/in_domain": "accuracy in",
    "accuracy/out_of_domain": "accuracy out",
    "best_of/4": "best of 4",
    "best_of/64": "best of 64",
    "gold/best": "policy: best round",
    "gold/mean": "policy: mean of rounds",
    "gold/last": "policy: last round",
    "proxy/gain": "policy: gain of its own reward",
    "kl/last": "policy: last KL, nats",
}


def table(found: dict[str, list[dict[str, float]]]) -> str:
    """Return mean and standard deviation over seeds by arm, in Markdown."""
    columns = {n: text for n, text in COLUMNS.items() if n in next(iter(found.values()))[0]}
    lines = ["| reward model | " + " | ".join(columns.values()) + " |"]
    lines.append("|---" * (len(columns) + 1) + "|")
    for arm, seeds in found.items():
        cells = [spread([one[name] for one in seeds]) for name in columns]
        lines.append(f"| {arm} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def differences(found: dict[str, list[dict[str, float]]], against: str) -> str:
    """Return paired differences over seeds to one arm, with t, in Markdown."""
    columns = {n: text for n, text in COLUMNS.items() if n in found[against][0]}
    lines = [f"| less {against} | " + " | ".join(columns.values()) + " |"]
    lines.append("|---" * (len(columns) + 1) + "|")
    for arm in (arm for arm in found if arm != against):
        cells = []
        for name in columns:
            pairs = zip(found[arm], found[against], strict=True)
            cells.append(paired([ours[name] - theirs[name] for ours, theirs in pairs]))
        lines.append(f"| {arm} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def spread(values: list[float]) -> str:
    """Return mean and standard deviation."""
    deviation = statistics.stdev(values) if len(values) > 1 else float("nan")
    return f"{statistics.mean(values):.3f} +- {deviation:.3f}"


def paired(values: list[float]) -> str:
    """Return the mean of paired differences and its t."""
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    mean = statistics.mean(values)
    return f"{mean:+.3f}" + (
        f" ({mean / (deviation / len(values) ** 0.5):.1f})" if deviation else ""
    )


def draw(found: dict[str, list[dict[str, float]]], out: Path) -> None:
    """Draw gold of best-of-n, and gold and proxy of policies, against the square root of KL."""
    figure = Figure(figsize=(15, 4.8), layout="constrained")
    FigureCanvasAgg(figure)
    best, gold, proxy = figure.subplots(1, 3)
    for number, (arm, seeds) in enumerate(found.items()):
        dotted = arm.startswith("ensemble")
        style = {"color": f"C{number % 10}", "linestyle": ":" if dotted else "-", "label": arm}
        style |= {"marker": "o", "markersize": 3}
        distances = [best_of_n_kl(n) ** 0.5 for n in NS]
        best.plot(distances, [_mean(seeds, f"best_of/{n}") for n in NS], **style)
        rounds = [n for n in range(100) if f"gold/in_domain/{n}" in seeds[0]]
        kl = [max(_mean(seeds, f"kl/policy_sft/in_domain/{n}"), 0) ** 0.5 for n in rounds]
        gold.plot(kl, [_mean(seeds, f"gold/in_domain/{n}") for n in rounds], **style)
        gains = [_mean(seeds, f"proxy/in_domain/{n}") for n in rounds]
        proxy.plot(kl, [gain - gains[0] for gain in gains], **style)
    best.set(title="best of n", ylabel="gold score, in domain")
    gold.set(title="policy, a point a round", ylabel="gold score, in domain")
    proxy.set(title="policy, a point a round", ylabel="gain of the reward it is trained on")
    best.legend(frameon=False, fontsize="x-small")
    for axes in (best, gold, proxy):
        axes.set_xlabel("square root of KL to the start, nats")
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(out, dpi=130)


def _mean(seeds: list[dict[str, float]], name: str) -> float:
    return statistics.mean(one[name] for one in seeds)


def main() -> None:
    """Train, measure, optimise, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--biases", type=json.loads, default=[0.3, -0.1, 0.15, 0.0])
    parser.add_argument("--reinitialise", type=float, default=0.0)
    parser.add_argument("--pairs", type=int, default=8192)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument(
        "--from-start", action="store_true", help="upcycle the start, not the trained dense model"
    )
    parser.add_argument("--arms", type=lambda text: text.split(","), default=list(ARMS))
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--no-policies", action="store_true", help="accuracy and best-of-n only")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--write", type=Path, help="folder for reward_hacking.md and .png")
    options = parser.parse_args()
    if unknown := set(options.arms) - set(ARMS):
        parser.error(f"unknown arms {sorted(unknown)}; there are {', '.join(ARMS)}")
    seeds = range(1 if options.quick else options.seeds)
    roots = {seed: options.out / f"seed_{seed}" for seed in seeds}
    torch.set_num_threads(1)
    answers = sampled(32 if options.quick else 256)
    with ThreadPoolExecutor(options.jobs) as pool:
        for wave in trainings(options):
            jobs = [(roots[seed], seed, one, options) for seed in seeds for one in wave]
            list(pool.map(lambda job: train(*job), jobs))
        list(pool.map(merge_uniformly, roots.values()))
        for root in roots.values():
            measure(root, options.arms, answers, 128 if options.quick else 2048)
            print(f"{root}: reward models measured", flush=True)
        if not options.no_policies:
            work = [(roots[seed], seed, arm, options) for seed in seeds for arm in options.arms]
            list(pool.map(lambda job: optimise(*job), work))
    found = {arm: [results(root, arm) for root in roots.values()] for arm in options.arms}
    baselines = [arm for arm in ("dense_longer", "dense") if arm in found]
    text = "\n\n".join([table(found), *(differences(found, arm) for arm in baselines)])
    print(text)
    if options.json:
        means = {arm: statistics.mean(o["best_of/64"] for o in ones) for arm, ones in found.items()}
        ratios = {f"best_of_64/{arm}_over_dense": m / means["dense"] for arm, m in means.items()}
        settings = {"seeds": len(seeds), "biases": options.biases}
        options.json.write_text(json.dumps({"ratios": ratios, "settings": settings}, indent=1))
    if options.write and not options.no_policies:
        draw(found, options.write / "reward_hacking.png")
        command = f"python {' '.join(sys.argv)}"
        parts = ["# Reward hacking on the letters task", f"    {command}", text]
        parts.append("![gold and reward](reward_hacking.png)")
        page = "\n\n".join(parts) + "\n"
        (options.write / "reward_hacking.md").write_text(page)


if __name__ == "__main__":
    main()
