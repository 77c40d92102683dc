"""A DPO step against TRL's on the same pairs, from the same weights, with the same losses.

    python benchmarks/dpo_vs_trl.py

Ours takes turns with each variant of TRL's ``DPOTrainer`` in one process of one thread: forward,
backward, fused AdamW, ``zero_grad`` and what the reference costs, in CPU seconds of the process, so
other processes do not count. Peaks of private memory come from a fresh process each. The model has
SmolLM2-135M's shape and random weights, ``--quick`` takes a smaller one, ``--model`` real weights;
pairs are drawn with lengths like HH's, ``--pairs`` reads real ones.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from alternating import Compared, alternate, at_least, at_most
from fusion import FULL, SMALL, random_llama
from hh_pairs import TokenCounts, count_tokens, in_batches, longest, typical, unused_token
from page import PeakOfMemory, markdown, private_bytes
from transformers import PreTrainedModel
from trl_options import add_options, check_options, chosen_pairs, run_parts
from trl_steps import RATE, TrlStep, Variant, dpo_step, quiet
from trl_tables import HEADER, millions, ratio_row, token_ranges, token_table

from tpmm_pl.data.batching import collate
from tpmm_pl.data.packing import pair_rows
from tpmm_pl.losses import dpo_loss
from tpmm_pl.models.adapters import LoraSettings, with_adapters
from tpmm_pl.models.load import PretrainedPolicy
from tpmm_pl.models.scoring import PairScorer, score_pairs
from tpmm_pl.types import InputError, Pair, PairBatch

BETA = 0.1
ARMS = {
    "trl": Variant("TRL as it comes"),
    "grouped": Variant("TRL grouped by length", grouped=True),
    "compact": Variant("TRL, compact head", compact=True),
    "precomputed": Variant(
        "TRL, compact head, precomputed reference", compact=True, precomputed=True
    ),
    "precomputed_grouped": Variant(
        "the same, grouped by length", compact=True, precomputed=True, grouped=True
    ),
    "leanest": Variant(
        "the same, not grouped, gradient checkpointing",
        compact=True,
        precomputed=True,
        checkpointing=True,
    ),
    "lora": Variant(
        "LoRA r16: TRL, compact head, precomputed reference",
        compact=True,
        precomputed=True,
        lora=True,
    ),
}
BARS = {"trl": 5.0, "precomputed": 2.5, "lora": 2.3}
QUICK_BARS = {"trl": 8.5, "precomputed": 2.5}
MEMORY_BARS = {"trl": 0.22, "precomputed": 0.40, "leanest": 0.8}
MEMORY_BATCHES = {"median": typical, "longest": longest}
"""Which batch is stepped on; the bars are those of a batch of rows as long as they may be."""


@dataclass(frozen=True)
class Work:
    """What all arms train: pairs, and the model they start from."""

    pairs: list[Pair]
    """With the log-probabilities of the starting model."""
    make_model: Callable[[], PreTrainedModel]
    """Makes the same weights every time."""
    size: int
    """Pairs a batch."""
    reference_seconds: float
    """CPU seconds of our reference pass, a batch."""

    @property
    def batches(self) -> int:
        """How many there are."""
        return len(self.pairs) // self.size


class OurStep:
    """Forward, backward, fused AdamW and ``zero_grad``; the reference is known."""

    def __init__(self, model: PreTrainedModel, batches: Sequence[PairBatch]) -> None:
        self.scorer, self.batches = PairScorer(model), batches
        trained = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=RATE, weight_decay=0.0, fused=True)

    def __call__(self, number: int) -> float:
        """Take a step on a batch; return its loss."""
        batch = self.batches[number]
        loss = dpo_loss(self.scorer(batch), batch.reference, beta=BETA).mean()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(loss.detach())


def model_maker(options: argparse.Namespace) -> Callable[[], PreTrainedModel]:
    """Return what makes the starting model, in training mode without dropout."""
    if options.model:
        return PretrainedPolicy(options.model).load_model
    return lambda: random_llama(SMALL if options.quick else FULL).train()


def scored_work(
    pairs: Sequence[Pair], make_model: Callable[[], PreTrainedModel], size: int
) -> Work:
    """Score the pairs under the starting model, as once a round."""
    model = make_model()
    score_pairs(model, pairs[:1])  # the first pass allocates
    started = time.process_time()
    logps = score_pairs(model, pairs)
    seconds = (time.process_time() - started) * size / len(pairs)
    columns = zip(pairs, logps.chosen.tolist(), logps.rejected.tolist(), strict=True)
    scored = [replace(p, ref_chosen_logps=c, ref_rejected_logps=r) for p, c, r in columns]
    return Work(scored, make_model, size, seconds)


def build(variant: Variant, work: Work) -> tuple[OurStep, TrlStep]:
    """Build both sides on the same batches, each with its own copy of the weights."""
    ours, theirs = work.make_model(), work.make_model()
    if variant.lora:
        torch.manual_seed(0)
        ours = with_adapters(ours, LoraSettings(r=16), task_type="CAUSAL_LM")
    trl = trl_step(variant, theirs, work)
    if variant.lora:
        trl.trainer.model.load_state_dict(ours.state_dict())
    batches = [collate([work.pairs[i] for i in part]) for part in trl.order]
    return OurStep(ours, batches), trl


def trl_step(variant: Variant, policy: PreTrainedModel, work: Work) -> TrlStep:
    """Build TRL's side; it keeps a frozen reference unless that is precomputed."""
    reference = None if variant.precomputed else work.make_model()
    pad_id = unused_token(pair_rows(work.pairs))
    return dpo_step(
        variant, policy, reference, work.pairs, size=work.size, pad_id=pad_id, beta=BETA
    )


@dataclass(frozen=True)
class Arm:
    """What one variant of TRL gave."""

    variant: Variant
    found: Compared
    ours_reference: float
    """CPU seconds of the reference pass, a batch."""
    trl_reference: float
    """0 where the step itself computes it."""
    tokens: list[TokenCounts]
    """Of its batches."""


def measure_arm(variant: Variant, work: Work) -> Arm:
    """Run ours and one variant of TRL; what they hold is freed."""
    ours, trl = build(variant, work)
    rows = [pair_rows([work.pairs[index] for index in part]) for part in trl.order]
    found = alternate(ours, trl, work.batches, typical(rows))
    seconds = trl.trainer.reference_seconds / work.batches
    arm = Arm(variant, found, work.reference_seconds, seconds, [count_tokens(one) for one in rows])
    del ours, trl
    gc.collect()
    return arm


def measure_times(options: argparse.Namespace) -> tuple[str, dict[str, float]]:
    """Return the table of ratios, and the ratios."""
    make_model = model_maker(options)
    pairs = chosen_pairs(options, make_model().config.vocab_size)
    work = scored_work(pairs, make_model, options.batch_size)
    print(token_table(work.pairs, work.size), end="\n\n", flush=True)
    bars = {} if options.pairs else QUICK_BARS if options.quick else BARS
    rows, ratios, step_seconds = [], {}, 0.0
    for name in options.arms:
        arm = measure_arm(ARMS[name], work)
        cells, of_arm = arm_row(name, arm, bars.get(name))
        print(" | ".join(cells), flush=True)
        rows.append(cells)
        ratios |= of_arm
        step_seconds = step_seconds or statistics.median(arm.found.ours.seconds)
    ratios["dpo_reference_pass_over_step"] = work.reference_seconds / step_seconds
    header = [*HEADER, "time, with the reference pass", "losses", "bar"]
    text = markdown(header, rows) + (
        f"\n\n{millions(work.make_model())} million parameters, {work.batches} batches of "
        f"{work.size} pairs; TRL's CPU seconds over ours, one thread, medians. *With the reference "
        "pass*: of one epoch, ours "
        f"({ratios['dpo_reference_pass_over_step']:.2f} of a step) and TRL's where it is "
        "precomputed. Operations of the batch of median length. "
        f"{token_ranges(work.pairs, work.size)}."
    )
    return text, ratios


def arm_row(name: str, arm: Arm, bar: float | None) -> tuple[list[str], dict[str, float]]:
    """Return a row of the table, and its ratios."""
    key, found = f"dpo_{name}", arm.found
    cells, ratios = ratio_row(key, arm.variant.title, found, arm.tokens)
    inside = statistics.median(
        found.ratios(ours_more=arm.ours_reference, other_more=arm.trl_reference)
    )
    cells += [f"{inside:.2f}", found.losses(), at_least(ratios[key], bar)]
    return cells, ratios | {f"{key}_with_reference_pass": inside}


def peak_in_this_process(options: argparse.Namespace) -> int:
    """Take one step on one of the batches; return the peak above the models before it."""
    maker = model_maker(options)
    policy = maker()
    pairs = chosen_pairs(options, policy.config.vocab_size)
    batches = in_batches(pairs, options.batch_size)
    chosen = batches[MEMORY_BATCHES[options.child_batch]([pair_rows(batch) for batch in batches])]
    pairs = [replace(pair, ref_chosen_logps=0.0, ref_rejected_logps=0.0) for pair in chosen]
    variant = ARMS.get(options.child)
    reference = maker() if variant and not variant.precomputed else None
    for model in (policy, reference):
        own_weights(model)
    before = private_bytes(Path("/proc/self/status").read_text(encoding="ascii"))
    step: Callable[[int], float]
    if variant is None:
        step = OurStep(policy, [collate(pairs)])
    else:
        pad_id = unused_token(pair_rows(pairs))
        step = dpo_step(
            variant, policy, reference, pairs, size=len(pairs), pad_id=pad_id, beta=BETA
        )
    with PeakOfMemory() as memory:
        step(0)
    return memory.peak - before


def own_weights(model: PreTrainedModel | None) -> None:
    """Copy the weights: those that are mapped from a file become private at the first step."""
    for parameter in () if model is None else model.parameters():
        parameter.data = parameter.data.clone()


def peak_in_fresh_process(name: str, batch: str, options: argparse.Namespace) -> int:
    """Return the largest of several peaks: a sampler can miss a peak, not invent one."""
    child = ["--child", name, "--child_batch", batch]
    command = [sys.executable, __file__, *sys.argv[1:], *child]
    runs = [
        subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
        for _ in range(options.peaks)
    ]
    return max(int(text.split()[-1]) for text in runs)


def measure_memory(options: argparse.Namespace) -> tuple[str, dict[str, float]]:
    """Return the table of peaks of private memory, and the ratios."""
    rows, ratios = [], {}
    names = ("ours", *MEMORY_BARS)
    for batch in MEMORY_BATCHES:
        peaks = {name: peak_in_fresh_process(name, batch, options) for name in names}
        rows.append([batch, "ours", f"{peaks['ours'] / 1e9:.2f}", "", ""])
        for name, bar in MEMORY_BARS.items():
            ratio = ratios[f"dpo_memory_{batch}_over_{name}"] = peaks["ours"] / peaks[name]
            judged = batch == "longest" and not (options.quick or options.pairs)
            verdict = at_most(ratio, bar if judged else None)
            size = f"{peaks[name] / 1e9:.2f}"
            rows.append([batch, ARMS[name].title, size, f"{ratio:.2f}", verdict])
    header = ["batch", "one DPO step", "peak private memory, GB", "ours over it", "bar"]
    text = markdown(header, rows) + (
        "\n\nAbove what the models take, also the frozen reference of *TRL as it comes*; gradients "
        f"and states of the optimizer count. Of {options.batches} batches of {options.batch_size}"
        " pairs the one of median length and the longest, which a run must have room for; the"
        f" largest peak of {options.peaks} fresh processes; ours keeps all activations."
    )
    return text, ratios


PARTS = {"memory": measure_memory, "times": measure_times}
"""Memory first: its processes need what this one holds after the times."""


def main() -> None:
    """Measure and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_options(parser)
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--child", choices=["ours", *MEMORY_BARS], help=argparse.SUPPRESS)
    parser.add_argument("--child_batch", choices=MEMORY_BATCHES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    check_options(parser, options)
    torch.set_num_threads(1)
    quiet()
    try:
        if options.child:
            print(peak_in_this_process(options))
        else:
            run_parts("dpo_vs_trl", PARTS, options)
    except InputError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
