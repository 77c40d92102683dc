"""What K completions of a prompt cost: ours against transformers' own ``generate``.

    python benchmarks/rollouts.py

Eight completions of each of eight prompts, random tokens, sampled at temperature 1 by
``sample_completions`` and by ``generate(do_sample=True, num_return_sequences=8)``, which take
turns in one process of one thread. Times are CPU seconds of the process, so other processes do not
count. Tokens are those that go through the model, padding included, counted by a hook. Once
without end tokens, so that both make as many tokens, and once with so many that a completion has
about 20: rows that have ended are then dropped, or not. The model is a Llama of the shape of
SmolLM2-135M with random weights, ``--quick`` a smaller one.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from alternating import spread
from fusion import FULL, SMALL, Shape, random_llama
from page import markdown, write_section
from torch import Tensor, nn
from transformers import GenerationConfig, LlamaForCausalLM

from tpmm_pl.models.scoring import score_completions
from tpmm_pl.rollouts import sample_completions
from tpmm_pl.types import Completion, Prompt

SHORTEST, LONGEST = 40, 400
"""Tokens of a prompt."""

TOKENS_TO_END = 20
PAD = 0


def draw_prompts(count: int, vocabulary: int, seed: int) -> list[Prompt]:
    """Draw prompts of random tokens."""
    generator = random.Random(f"{seed}/rollouts")
    prompts = []
    for index in range(count):
        length = generator.randint(SHORTEST, LONGEST)
        ids = tuple(generator.randrange(1, vocabulary) for _ in range(length))
        prompts.append(Prompt(f"{seed}/{index}", "", ids))
    return prompts


def end_ids(vocabulary: int, every: int) -> list[int]:
    """Return end tokens, one in ``every`` of a vocabulary of which all are about as likely."""
    return list(range(1, vocabulary, every))


@dataclass
class Passed:
    """Counts the tokens that go through a model, padding included."""

    prefill: int = 0
    steps: int = 0

    def count(self, _: nn.Module, args: Any, inputs: dict[str, Any]) -> None:
        """Count a forward pass; a hook."""
        rows, tokens = inputs["input_ids"].shape
        if tokens > 1:
            self.prefill += rows * tokens
        else:
            self.steps += rows


@dataclass
class Measured:
    """What the batches gave for one way."""

    seconds: list[float] = field(default_factory=list)
    made: list[int] = field(default_factory=list)
    """Tokens of completions, end tokens included."""
    passed: list[Passed] = field(default_factory=list)

    @property
    def speeds(self) -> list[float]:
        """Tokens made a CPU second, batch by batch."""
        return [made / seconds for made, seconds in zip(self.made, self.seconds, strict=True)]

    def mean(self, of: Callable[[Passed], int]) -> str:
        """Return the mean of a count."""
        return f"{statistics.mean(map(of, self.passed)):,.0f}"


class Ours:
    """``sample_completions``."""

    def __init__(self, model: LlamaForCausalLM, options: argparse.Namespace) -> None:
        self.model, self.options = model, options
        self.completions: list[Completion] = []

    def __call__(self, prompts: Sequence[Prompt]) -> int:
        tokenizer: Any = SimpleNamespace(
            pad_token_id=PAD, eos_token_id=None, decode=lambda ids, **_: ""
        )
        self.completions = sample_completions(
            self.model,
            tokenizer,
            prompts,
            samples=self.options.samples,
            max_new_tokens=self.options.max_new_tokens,
            key="0",
        )
        return sum(len(completion.ids) for completion in self.completions)


class Generate:
    """The peer."""

    def __init__(self, model: LlamaForCausalLM, options: argparse.Namespace) -> None:
        self.model, self.options = model, options

    def __call__(self, prompts: Sequence[Prompt]) -> int:
        width = max(len(prompt.ids) for prompt in prompts)
        padding = [[PAD] * (width - len(prompt.ids)) for prompt in prompts]
        ids = [[*pad, *prompt.ids] for pad, prompt in zip(padding, prompts, strict=True)]
        mask = [[0] * len(pad) + [1] * (width - len(pad)) for pad in padding]
        ends = self.model.generation_config.eos_token_id
        settings = GenerationConfig(
            do_sample=True,
            top_k=0,
            num_return_sequences=self.options.samples,
            max_new_tokens=self.options.max_new_tokens,
            eos_token_id=ends,
            pad_token_id=PAD,
        )
        rows = self.model.generate(
            torch.tensor(ids), attention_mask=torch.tensor(mask), generation_config=settings
        )
        return tokens_made(rows[:, width:], ends or [])


def tokens_made(rows: Tensor, ends: Sequence[int]) -> int:
    """Count the tokens of completions up to their end tokens, these included, ``(N, T)``."""
    ended = torch.isin(rows, torch.tensor(ends, dtype=torch.long)).cumsum(1)
    # before the first end token all counts are 0
    return int((ended == 0).sum() + (ended[:, -1] > 0).sum())


def alternate(
    model: nn.Module, ways: Sequence[Callable[[Sequence[Prompt]], int]], batches: list[list[Prompt]]
) -> list[Measured]:
    """Run every way on every batch; who goes first alternates."""
    found = [Measured() for _ in ways]
    turns = list(zip(found, ways, strict=True))
    for batch in batches:
        for measured, way in turns:
            passed = Passed()
            hook = model.register_forward_pre_hook(passed.count, with_kwargs=True)
            started = time.process_time()
            made = way(batch)
            measured.seconds.append(time.process_time() - started)
            measured.made.append(made)
            measured.passed.append(passed)
            hook.remove()
        turns.reverse()
    return found


def measure(options: argparse.Namespace, shape: Shape) -> tuple[str, dict[str, float]]:
    """Return the table, and the ratios."""
    model = random_llama(shape).eval()
    draws = range(options.batches + 1)
    batches = [draw_prompts(options.prompts, shape.vocabulary, number) for number in draws]
    rows, ratios, errors = [], {}, []
    for name, ends in {"none": None, "ends": end_ids(shape.vocabulary, TOKENS_TO_END)}.items():
        model.generation_config.eos_token_id = ends
        ours, peer = Ours(model, options), Generate(model, options)
        alternate(model, [ours, peer], [batches[0][:1]])  # the first passes allocate
        mine, theirs = alternate(model, [ours, peer], batches[1:])
        errors.append(logps_error(model, ours.completions))
        faster = [a / b for a, b in zip(mine.speeds, theirs.speeds, strict=True)]
        ratio = ratios[f"tokens_a_second_over_generate_{name}"] = statistics.median(faster)
        rows.append([name, f"{ratio:.2f}", spread(faster)])
        for of in (lambda p: p.prefill, lambda p: p.steps):
            rows[-1] += [theirs.mean(of), mine.mean(of)]
        for measured in (theirs, mine):
            rows[-1].append(f"{statistics.mean(measured.made):,.0f}")
        for measured in (theirs, mine):
            rows[-1].append(f"{statistics.median(measured.speeds):,.0f}")
    header = ["end tokens", "ours / generate", "10 - 90 %"]
    header += ["prefilled, generate", "ours", "decoded, generate", "ours"]
    header += ["made, generate", "ours", "tokens/s, generate", "ours"]
    text = markdown(header, rows) + (
        f"\n\n{sum(p.numel() for p in model.parameters()) / 1e6:.0f} million parameters, "
        f"{options.batches} batches of {options.prompts} prompts of {SHORTEST} to {LONGEST} "
        f"tokens, {options.samples} completions of at most {options.max_new_tokens} tokens each; "
        "medians of ratios of tokens made a CPU second, one thread; tokens are means a batch. "
        f"Log-probabilities kept are within {max(errors):.0e} nats a completion of those that "
        "scoring computes."
    )
    return text, {**ratios, "logps_error": max(errors)}


def logps_error(model: nn.Module, completions: Sequence[Completion]) -> float:
    """Return the largest difference of a kept log-probability and the model's own, in nats."""
    kept = torch.tensor([completion.logps for completion in completions])
    return float((kept - score_completions(model, completions)).abs().max())


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=8, help="K")
    parser.add_argument("--prompts", type=int, help="a batch; 8 or, if quick, 4")
    parser.add_argument("--max_new_tokens", type=int, help="64 or, if quick, 16")
    parser.add_argument("--batches", type=int, help="20 or, if quick, 2")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--write", type=Path, help="a file with a section for the table")
    options = parser.parse_args()
    options.prompts = options.prompts or (4 if options.quick else 8)
    options.max_new_tokens = options.max_new_tokens or (16 if options.quick else 64)
    options.batches = options.batches or (2 if options.quick else 20)
    torch.set_num_threads(1)
    shape = SMALL if options.quick else FULL
    text, ratios = measure(options, shape)
    print(text, flush=True)
    if options.write:
        write_section(options.write, "rollouts_quick" if options.quick else "rollouts", text)
    if options.json:
        names = ("quick", "samples", "prompts", "max_new_tokens", "batches")
        settings = {name: getattr(options, name) for name in names}
        settings |= {"model": asdict(shape), "torch": torch.__version__}
        content = {"ratios": ratios, "settings": settings}
        options.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
