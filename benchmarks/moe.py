"""What a mixture of experts costs against the dense model it came from and turns back into.

    python benchmarks/moe.py

Dense model, mixture (5 experts, 3 active) and consolidated model take turns in one process of one
thread, forward only, on 512, 1024 and 2048 tokens; so do one dense feed-forward layer and its
mixture. Times are CPU seconds of the process, so other processes do not count, and operations are
counted by torch. The peak of private memory of upcycling comes from a fresh process. The model is
a Llama of the width of SmolLM2-135M with random weights, ``--quick`` a smaller one.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from page import PeakOfMemory, markdown, write_section
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForSequenceClassification

from tpmm_pl.moe.convert import consolidate, moe_layers, shared_coefficients, upcycle
from tpmm_pl.moe.routing import MoESettings

SETTINGS = MoESettings(experts=5, active=3, shared=1)
MEMORY_BAR = 1.3
ROW = 512


@dataclass(frozen=True)
class Shape:
    """Of a Llama with one score."""

    hidden: int = 576
    layers: int = 10
    heads: int = 9
    kv_heads: int = 3
    ffn: int = 1536
    vocabulary: int = 49152


FULL, SMALL = Shape(), Shape(hidden=384, layers=3, heads=6, kv_heads=2, ffn=1024, vocabulary=4096)

Forward = Callable[[], object]


def random_reward_model(shape: Shape) -> LlamaForSequenceClassification:
    """Return the same random model every time."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.ffn,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=ROW,
        num_labels=1,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=None,
    )
    return LlamaForSequenceClassification(config).eval()


def upcycled(shape: Shape) -> LlamaForSequenceClassification:
    """Return the random model as a mixture."""
    model = random_reward_model(shape)
    upcycle(model, SETTINGS, generator=torch.Generator().manual_seed(0))
    return model


def consolidated(mixture: LlamaForSequenceClassification) -> LlamaForSequenceClassification:
    """Return a copy of the mixture merged into a dense model."""
    model = deepcopy(mixture)
    weights = torch.full((len(moe_layers(model)), SETTINGS.normal), 1 / SETTINGS.normal)
    consolidate(model, shared_coefficients(weights, SETTINGS.shared, 0.5))
    return model


@dataclass
class Compared:
    """One variant over dense: operations, and CPU seconds of every round."""

    operations: float
    ratios: list[float]

    @property
    def seconds(self) -> float:
        """Return the median of the ratios."""
        return statistics.median(self.ratios)


def cpu_seconds(forward: Forward) -> float:
    """Return the CPU seconds of the process for one call."""
    started = time.process_time()
    forward()
    return time.process_time() - started


def operations(forward: Forward) -> int:
    """Count the floating-point operations of the matrix products of one call."""
    with FlopCounterMode(display=False) as counter:
        forward()
    return counter.get_total_flops()


def compare(dense: Forward, others: Mapping[str, Forward], rounds: int) -> dict[str, Compared]:
    """Run every variant each round, a dense call before and behind it."""
    base = operations(dense)
    found = {name: Compared(operations(call) / base, []) for name, call in others.items()}
    for _ in range(rounds):
        before = cpu_seconds(dense)
        for name, call in others.items():
            seconds = cpu_seconds(call)
            after = cpu_seconds(dense)
            found[name].ratios.append(2 * seconds / (before + after))
            before = after
    return found


def layer_variants(
    dense: nn.Module, mixture: nn.Module, tokens: int, width: int
) -> tuple[Forward, dict[str, Forward]]:
    """Return forward passes of the first feed-forward layer."""
    x = torch.randn(tokens // ROW, ROW, width, generator=torch.Generator().manual_seed(0))
    layer = next(iter(moe_layers(mixture).values()))
    mlp = dense.get_submodule("model.layers.0.mlp")
    return lambda: mlp(x), {"feed-forward layer, mixture": lambda: layer(x)}


def model_variants(
    dense: nn.Module, mixture: nn.Module, merged: nn.Module, tokens: int, vocabulary: int
) -> tuple[Forward, dict[str, Forward]]:
    """Return forward passes of whole models."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, vocabulary, (tokens // ROW, ROW), generator=generator)

    def run(model: nn.Module) -> Tensor:
        logits: Tensor = model(input_ids=ids, use_cache=False).logits
        return logits

    others = {"model, mixture": lambda: run(mixture), "model, merged": lambda: run(merged)}
    return lambda: run(dense), others


@torch.no_grad()
def measure_times(options: argparse.Namespace, shape: Shape) -> tuple[str, dict[str, float]]:
    """Return the table of operations and times, and the ratios."""
    dense, mixture = random_reward_model(shape), upcycled(shape)
    merged = consolidated(mixture)
    rows, ratios = [], {}
    for tokens in options.tokens:
        layer = layer_variants(dense, mixture, tokens, shape.hidden)
        model = model_variants(dense, mixture, merged, tokens, shape.vocabulary)
        found = compare(*layer, options.rounds) | compare(*model, options.rounds)
        for name, one in found.items():
            cells = [name, str(tokens), f"{one.operations:.2f}", f"{one.seconds:.2f}"]
            cells += [f"{min(one.ratios):.2f} - {max(one.ratios):.2f}"]
            rows.append([*cells, f"{one.seconds / one.operations:.2f}"])
            key = name.replace("feed-forward layer", "layer").replace(", ", "_")
            ratios[f"{key}_operations_{tokens}"] = one.operations
            ratios[f"{key}_seconds_{tokens}"] = one.seconds
    header = ["over dense", "tokens", "operations", "CPU seconds", "range", "seconds / operations"]
    text = markdown(header, rows) + (
        f"\n\n{_millions(dense)} million parameters, {_millions(mixture)} as a mixture of "
        f"{SETTINGS.experts} experts with {SETTINGS.active} active; forward passes, medians of "
        f"{options.rounds} rounds, one thread."
    )
    return text, ratios


def peak_of_upcycling(shape: Shape) -> tuple[int, int]:
    """Return the peak of upcycling beyond what was there before, and the size of the mixture.

    The dense model itself counts; the interpreter and its libraries do not.
    """
    with PeakOfMemory() as memory:
        model = random_reward_model(shape)
        upcycle(model, SETTINGS, generator=torch.Generator().manual_seed(0))
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    return memory.peak - memory.start, size


def measure_memory(options: argparse.Namespace, shape: Shape) -> tuple[str, dict[str, float]]:
    """Return a sentence on the peak of private memory, and the ratio."""
    command = [sys.executable, __file__, "--child", *(["--quick"] if options.quick else [])]
    runs = [
        subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-2:]
        for _ in range(options.peaks)
    ]
    # the largest of several: a sampler can miss a peak, not invent one
    peak, size = max((int(peak), int(size)) for peak, size in runs)
    text = (
        f"Peak private memory of upcycling, the dense model included: {peak / size:.2f} sizes of "
        f"the mixture ({size / 1e6:.0f} MB), the largest of {options.peaks} fresh processes. "
        f"The bar is {MEMORY_BAR}."
    )
    return text, {"upcycling_peak_over_mixture": peak / size}


def _millions(model: nn.Module) -> int:
    return round(sum(p.numel() for p in model.parameters()) / 1e6)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 1024, 2048])
    parser.add_argument("--rounds", type=int, help="11 or, if quick, 3")
    parser.add_argument("--peaks", type=int, help="processes a peak; 3 or, if quick, 1")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--write", type=Path, help="a file with sections moe_memory, moe_times")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if any(tokens < ROW or tokens % ROW for tokens in options.tokens):
        parser.error(f"--tokens {options.tokens}: rows have {ROW} tokens, so give multiples of it")
    options.rounds = options.rounds or (3 if options.quick else 11)
    options.peaks = options.peaks or (1 if options.quick else 3)
    torch.set_num_threads(1)
    shape = SMALL if options.quick else FULL
    if options.child:
        print(*peak_of_upcycling(shape))
        return
    ratios: dict[str, float] = {}
    for name, part in (("moe_memory", measure_memory), ("moe_times", measure_times)):
        text, of_part = part(options, shape)
        ratios |= of_part
        print(text, end="\n\n", flush=True)
        if options.write:
            write_section(options.write, name, text)
    if options.json:
        settings = {"quick": options.quick, "rounds": options.rounds, "peaks": options.peaks}
        settings |= {"tokens": options.tokens, "model": asdict(shape), "moe": asdict(SETTINGS)}
        content = {"ratios": ratios, "settings": {**settings, "torch": torch.__version__}}
        options.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
