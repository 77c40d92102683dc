"""What learning a merge costs: one fusion step against one plain DPO step of the same batch.

    python benchmarks/fusion.py

Three ways take turns in one process of one thread: a DPO step (forward, backward, fused AdamW),
a step of ``FusionWeights`` whose sources stay on disk, and the naive way, which stacks K copies in
memory and differentiates through the merge. Times are CPU seconds of the process, so other
processes do not count. Peaks of private memory come from a fresh process a way and K: files that
are only mapped do not count. The model is a Llama of the shape of SmolLM2-135M with random
weights, ``--quick`` a smaller one.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from lightning.fabric import Fabric
from page import PeakOfMemory, markdown, write_section
from torch import Tensor, nn
from torch.func import functional_call
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils.logging import disable_progress_bar

from tpmm_pl.data.batching import collate
from tpmm_pl.losses import dpo_loss
from tpmm_pl.models.scoring import PairScorer, score_pairs
from tpmm_pl.modules.fusion import FusionWeights
from tpmm_pl.trajectory import TrajectoryStore
from tpmm_pl.types import Pair, PairBatch, PairLogps

BAR, MEMORY_BAR = 1.35, 0.05
BETA = 0.1


@dataclass(frozen=True)
class Shape:
    """Of a Llama with tied embeddings."""

    hidden: int = 576
    layers: int = 30
    heads: int = 9
    kv_heads: int = 3
    ffn: int = 1536
    vocabulary: int = 49152


FULL, SMALL = Shape(), Shape(hidden=384, layers=6, heads=6, kv_heads=2, ffn=1024)


def random_llama(shape: Shape) -> LlamaForCausalLM:
    """Return the same random model every time."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.ffn,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config)


def draw_pairs(count: int, vocabulary: int, seed: int = 0) -> list[Pair]:
    """Draw pairs of random tokens: prompts of 40 to 200, completions of 20 to 120 tokens."""
    generator = random.Random(f"{seed}/fusion")

    def ids(shortest: int, longest: int) -> tuple[int, ...]:
        length = generator.randint(shortest, longest)
        return tuple(generator.randrange(1, vocabulary) for _ in range(length))

    return [
        Pair(str(index), "", "", "", ids(40, 200), ids(20, 120), ids(20, 120))
        for index in range(count)
    ]


def draw_batches(model: nn.Module, count: int, size: int, vocabulary: int) -> list[PairBatch]:
    """Draw ``count`` batches of ``size`` pairs, scored under the starting model."""
    pairs = draw_pairs(size * count, vocabulary)
    logps = score_pairs(model, pairs)
    columns = zip(pairs, logps.chosen.tolist(), logps.rejected.tolist(), strict=True)
    scored = [replace(p, ref_chosen_logps=c, ref_rejected_logps=r) for p, c, r in columns]
    return [collate(scored[start : start + size]) for start in range(0, len(scored), size)]


def write_snapshots(model: nn.Module, store: TrajectoryStore, count: int) -> None:
    """Write the start and ``count - 1`` snapshots, each a tenth of a weight's spread further."""
    generator = torch.Generator().manual_seed(1)
    state = {name: p.detach().clone() for name, p in model.named_parameters()}
    for index in range(count):
        store.add_snapshot(index, state)
        for tensor in state.values():
            tensor.add_(torch.randn(tensor.shape, generator=generator), alpha=0.002)


class PlainStep:
    """Forward, backward and AdamW of a policy; the reference is known."""

    def __init__(self, model: nn.Module) -> None:
        self.scorer = PairScorer(model)
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)

    def __call__(self, batch: PairBatch) -> float:
        loss = dpo_loss(self.scorer(batch), batch.reference, beta=BETA).mean()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return float(loss.detach())


class StreamedStep:
    """A step of the learned reference as the product takes it."""

    def __init__(self, model: nn.Module, store: TrajectoryStore, count: int) -> None:
        module = FusionWeights().bind(model, store, tuple(range(count)))
        fabric = Fabric(accelerator="cpu", devices=1)
        self.module = module
        self.step, _ = fabric.setup(module, module.configure_optimizers())

    def __call__(self, batch: PairBatch) -> float:
        self.step.training_step([batch], 0)
        return self.module.losses[-1]

    @property
    def weights(self) -> nn.Parameter:
        return self.module.weights


class StackedStep:
    """The naive way: K copies in memory, autograd through the merge."""

    def __init__(self, model: nn.Module, store: TrajectoryStore, count: int) -> None:
        self.scored = _Scored(model)
        sources = [store.source(index) for index in range(count)]
        self.stacks = {name: torch.stack([s[name] for s in sources]) for name in sources[0]}
        self.weights = nn.Parameter(torch.zeros(1, count))
        self.optimizer = torch.optim.Adam([self.weights], lr=0.3)

    def __call__(self, batch: PairBatch) -> float:
        row = self.weights.softmax(-1)[0]
        merged = {f"model.{n}": torch.tensordot(row, s, 1) for n, s in self.stacks.items()}
        logps: PairLogps = functional_call(self.scored, merged, (batch,))
        loss = dpo_loss(logps, batch.reference, beta=BETA).mean()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return float(loss.detach())


class _Scored(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self._scorer = PairScorer(model)

    def forward(self, batch: PairBatch) -> PairLogps:
        return self._scorer(batch)


Step = StreamedStep | StackedStep
WAYS: dict[str, type[Step]] = {"streamed": StreamedStep, "stacked": StackedStep}


@dataclass
class Timing:
    """What the batches gave for one way and K."""

    ratios: list[float]
    losses: list[float]


def cpu_seconds(step: Callable[[PairBatch], float], batch: PairBatch) -> tuple[float, float]:
    """Return the CPU seconds of the process for a step, and its loss."""
    started = time.process_time()
    loss = step(batch)
    return time.process_time() - started, loss


def compare_times(
    plain: Callable[[PairBatch], float],
    steps: Mapping[str, Callable[[PairBatch], float]],
    batches: Sequence[PairBatch],
) -> dict[str, Timing]:
    """Run every step on every batch, a plain step before and behind each two of them.

    Returns:
        By step, the ratio to the mean of the plain steps around it, and its losses.
    """
    found = {name: Timing([], []) for name in steps}
    for number, batch in enumerate(batches):
        names = list(steps)
        names = names[number % len(names) :] + names[: number % len(names)]
        before, _ = cpu_seconds(plain, batch)
        for start in range(0, len(names), 2):
            measured = [(n, cpu_seconds(steps[n], batch)) for n in names[start : start + 2]]
            after, _ = cpu_seconds(plain, batch)
            for name, (seconds, loss) in measured:
                found[name].ratios.append(2 * seconds / (before + after))
                found[name].losses.append(loss)
            before = after
    return found


@dataclass
class Agreement:
    """Losses of both ways at the plain average, and the relative errors of their gradients."""

    losses: list[float]
    errors: list[float]


def compare_gradients(
    model: nn.Module, store: TrajectoryStore, count: int, batch: PairBatch
) -> Agreement:
    """Compare both ways' coefficient gradients with dot products in float64."""
    exact = exact_gradient(model, store, count, batch)
    found = Agreement([], [])
    for way in WAYS.values():
        step = way(model, store, count)
        found.losses.append(step(batch))
        if (gradient := step.weights.grad) is None:
            raise RuntimeError(f"{way.__name__} left no gradient")
        found.errors.append(float((gradient[0].double() - exact).norm() / exact.norm()))
    return found


def exact_gradient(
    model: nn.Module, store: TrajectoryStore, count: int, batch: PairBatch
) -> Tensor:
    """Return the gradient of the softmax's parameters at the plain average, ``(K,)`` float64."""
    merge = FusionWeights().bind(model, store, tuple(range(count))).merge
    merge.write(torch.full((1, count), 1 / count))
    dpo_loss(PairScorer(model)(batch), batch.reference, beta=BETA).mean().backward()
    dots = torch.zeros(count, dtype=torch.float64)
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            gradient, parameter.grad = parameter.grad.double().flatten(), None
            for k, source in enumerate(merge.sources):
                dots[k] += gradient @ source[name].double().flatten()
    return (dots - dots.mean()) / count


def peak_in_this_process(way: str, count: int, root: Path, shape: Shape) -> int:
    """Take four steps on one pair, so that weights outweigh activations; return the peak."""
    model = random_llama(shape)
    zeros = PairLogps(torch.zeros(1), torch.zeros(1))
    batch = collate(draw_pairs(1, shape.vocabulary))
    batch.reference = zeros
    with PeakOfMemory() as memory:
        step = WAYS[way](model, TrajectoryStore(root), count)
        for _ in range(4):
            step(batch)
    return memory.peak


def peak_in_fresh_process(way: str, count: int, root: Path, quick: bool) -> int:
    """Return the peak of private memory of a process that does nothing else."""
    command = [sys.executable, __file__, "--child", way, str(count), str(root)]
    command += ["--quick"] if quick else []
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(done.stdout.split()[-1])


def measure_times(options: argparse.Namespace, root: Path) -> tuple[str, dict[str, float]]:
    """Return the table of times, losses and gradients, and the ratios."""
    shape = SMALL if options.quick else FULL
    store = TrajectoryStore(root)
    model, merged = random_llama(shape), random_llama(shape)
    batches = draw_batches(model, options.batches + 1, options.pairs, shape.vocabulary)
    counts = options.snapshots
    agreement = {count: compare_gradients(merged, store, count, batches[0]) for count in counts}
    plain = PlainStep(model)
    streamed = {str(count): StreamedStep(merged, store, count) for count in counts}
    compare_times(plain, streamed, batches[:1])  # the first steps allocate
    times = compare_times(plain, streamed, batches[1:])
    rows, ratios = [], {}
    for count in counts:
        stacked = {"stacked": StackedStep(merged, store, count)}  # one at a time: K copies
        naive = compare_times(plain, stacked, batches[: options.naive_batches + 1])["stacked"]
        del stacked
        ours = times[str(count)].ratios
        ratio = ratios[f"fusion_over_plain_k{count}"] = statistics.median(ours)
        slow = ratios[f"stacked_over_plain_k{count}"] = statistics.median(naive.ratios[1:])
        low, *_, high = statistics.quantiles(ours, n=10)
        cells = [str(count), f"{ratio:.2f}", f"{low:.2f} - {high:.2f}", f"{slow:.2f}"]
        cells += [f"{loss:.6f}" for loss in agreement[count].losses]
        cells += [f"{error:.0e}" for error in agreement[count].errors]
        rows.append(cells)
        for way, error in zip(WAYS, agreement[count].errors, strict=True):
            ratios[f"{way}_gradient_error_k{count}"] = error
    header = ["K", "streamed / plain", "10 - 90 %", "stacked / plain", "loss, streamed"]
    header += ["loss, stacked", "gradient's error, streamed", "stacked"]
    text = markdown(header, rows) + (
        f"\n\n{_millions(model)} million parameters, {options.batches} batches of {options.pairs} "
        f"pairs ({options.naive_batches} for the stacked way), medians of ratios of CPU seconds, "
        "one thread; errors are relative, against dot products in float64. "
        f"The bar of streamed / plain is {BAR}."
    )
    return text, ratios


def measure_memory(options: argparse.Namespace, root: Path) -> tuple[str, dict[str, float]]:
    """Return the table of peaks of private memory, and the growths."""
    few, many = options.memory
    size = 4 * sum(p.numel() for p in random_llama(SMALL if options.quick else FULL).parameters())
    rows, ratios = [], {}
    for way in WAYS:
        # the largest of several: a sampler can miss a peak, not invent one
        peaks = [
            max(peak_in_fresh_process(way, k, root, options.quick) for _ in range(options.peaks))
            for k in (few, many)
        ]
        growth = ratios[f"{way}_growth"] = (peaks[1] - peaks[0]) / size
        rows.append([way, *(f"{peak / size:.2f}" for peak in peaks), f"{100 * growth:.1f} %"])
    header = ["peak private memory, in sizes of the model", f"K = {few}", f"K = {many}", "growth"]
    text = markdown(header, rows) + (
        f"\n\n{size / 4e6:.0f} million parameters, four steps on one pair, the largest peak of "
        f"{options.peaks} fresh processes. The bar of the growth of streamed is {MEMORY_BAR:.0%}."
    )
    return text, ratios


def _millions(model: nn.Module) -> int:
    return round(sum(p.numel() for p in model.parameters()) / 1e6)


PARTS = {"memory": measure_memory, "times": measure_times}
"""Memory first: its processes need what this one holds after the times."""


def main() -> None:
    """Measure and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--snapshots", type=int, nargs="+", help="K; 2 4 8 9 or, if quick, 2 8")
    parser.add_argument("--batches", type=int, help="20 or, if quick, 4")
    parser.add_argument("--pairs", type=int, help="a batch; 4 or, if quick, 2")
    parser.add_argument("--naive_batches", type=int, help="3 or, if quick, 1")
    parser.add_argument("--memory", type=int, nargs=2, default=[2, 8], help="two values of K")
    parser.add_argument("--peaks", type=int, help="processes a peak; 3 or, if quick, 1")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--write", type=Path, help="a file with a section for each part")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.snapshots = options.snapshots or ([2, 8] if options.quick else [2, 4, 8, 9])
    options.batches = options.batches or (4 if options.quick else 20)
    options.pairs = options.pairs or (2 if options.quick else 4)
    options.naive_batches = options.naive_batches or (1 if options.quick else 3)
    options.peaks = options.peaks or (1 if options.quick else 3)
    torch.set_num_threads(1)
    disable_progress_bar()
    shape = SMALL if options.quick else FULL
    if options.child:
        way, count, folder = options.child
        print(peak_in_this_process(way, int(count), Path(folder), shape))
        return
    ratios: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as name:
        count = max(*options.snapshots, *options.memory)
        write_snapshots(random_llama(shape), TrajectoryStore(Path(name)), count)
        for part in options.parts:
            text, of_part = PARTS[part](options, Path(name))
            ratios |= of_part
            print(text, flush=True)
            if options.write:
                size = "_quick" if options.quick else ""
                write_section(options.write, f"fusion_{part}{size}", text)
    if options.json:
        settings = {"quick": options.quick, "batches": options.batches, "pairs": options.pairs}
        settings |= {"model": asdict(shape)}
        content = {"ratios": ratios, "settings": {**settings, "torch": torch.__version__}}
        options.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
