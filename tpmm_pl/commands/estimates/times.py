"""How long a fit takes, from passes that are timed and thrown away."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import nn

from tpmm_pl.commands.estimates.table import Row, duration
from tpmm_pl.commands.estimates.workload import (
    Workload,
    amount,
    pairs_of_run,
    sampler_of,
)
from tpmm_pl.data.batching import micro_batches
from tpmm_pl.data.module import FusionData
from tpmm_pl.models.blueprint import kept_bytes
from tpmm_pl.models.reward import RewardScorer
from tpmm_pl.models.scoring import PairScorer, score_pairs
from tpmm_pl.modes import evaluating
from tpmm_pl.rollouts import sample_completions
from tpmm_pl.types import Pair, PairBatch, Prompt

_ROWS, _TOKENS = 32, 16
"""Of the sampling that is timed, at most: completions at once, and tokens of each."""


@dataclass(frozen=True)
class Speed:
    """Seconds a token on one device."""

    step: float
    """Forward and backward pass of training, without the optimizer's update."""
    scoring: float
    """Forward pass without gradients; 0 where it is not needed."""
    sampling: float
    """Token sampled, several rows at once; 0 where none are."""
    drawn: bool
    """Whether the pairs were drawn token ids."""
    kept: float | None
    """Bytes a token that a pass keeps for the backward pass, logits included; ``None`` where
    activations are checkpointed, which hides what is kept."""


def speed(
    model: nn.Module,
    trainer: Trainer,
    data: Any,
    callbacks: Sequence[Any],
    work: Workload,
    *,
    rewards: bool,
) -> Speed:
    """Time passes of the first training pairs, and a short sampling; nothing is updated.

    Every pass runs twice, and the second one counts: the first also builds what later ones reuse.

    Args:
        model: With its weights, on its device; its gradients are gone afterwards.
        trainer: Its precision is that of the passes.
        data: Set up.
        callbacks: Of the trainer.
        work: What needs to be timed at all.
        rewards: Whether the model scores, and has no log-probabilities.
    """
    pairs, drawn = _pairs(data, callbacks, model)
    budget = data.token_budget
    device = next(model.parameters()).device
    batches = [batch.to(device) for batch in micro_batches(pairs, budget)]
    scorer: Any = RewardScorer(model) if rewards else PairScorer(model)
    count = amount(pairs).tokens
    scoring = sampling = 0.0
    with trainer.precision_plugin.forward_context():
        step = _seconds(device, lambda: _train(model, scorer, batches)) / count
        if work.scored.count and not rewards:
            with evaluating(model):
                scoring = _seconds(device, lambda: score_pairs(model, pairs, token_budget=budget))
            scoring /= count
        if work.sampled.count:
            sampling = _sampling(model, data, callbacks, device)
        kept = None
        if not any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
            kept = kept_bytes(model, lambda: scorer(batches[0])) / len(batches[0].tree.tokens)
    return Speed(step, scoring, sampling, drawn, kept)


def time_rows(found: Speed, work: Workload, devices: int) -> list[Row]:
    """Return the rows of what a fit takes.

    Args:
        found: As measured.
        work: Of the whole fit.
        devices: That share the work.
    """
    kind = "drawn token ids" if found.drawn else "the first training pairs"
    of_step = work.pairs.tokens / work.pairs.count * work.pairs_a_step * found.step
    parts = {
        "training": work.rounds * work.steps * of_step,
        "log-probabilities of references": work.scored.tokens * found.scoring,
        "learning coefficients": work.fusion.tokens * found.step,
        "sampling": work.sampled.tokens * found.sampling,
    }
    first = f"measured on {kind}, {1 / found.step:,.0f} tokens/s; no optimizer's update in it"
    return [
        Row("forward and backward of a step", duration(of_step / devices), first),
        *(
            Row(name, duration(seconds / devices), _basis(name, found))
            for name, seconds in parts.items()
            if seconds
        ),
        Row(
            "= together",
            duration(sum(parts.values()) / devices),
            "rounds vary; judges, loading and files come on top",
        ),
    ]


def _basis(name: str, found: Speed) -> str:
    if name == "sampling":
        rate = f"{1 / found.sampling:,.0f} tokens/s"
        return f"multiplied, at most; measured {rate} of up to {_ROWS} rows"
    if name.startswith("log"):
        return f"multiplied; measured {1 / found.scoring:,.0f} tokens/s"
    return "multiplied" if name == "training" else "multiplied, at most: it ends when nothing moves"


def _train(
    model: nn.Module, scorer: Callable[[PairBatch], Any], batches: Sequence[PairBatch]
) -> None:
    for batch in batches:
        chosen, rejected = scorer(batch)
        (chosen - rejected).sum().backward()
    for parameter in model.parameters():
        parameter.grad = None


def _sampling(model: nn.Module, data: Any, callbacks: Sequence[Any], device: torch.device) -> float:
    prompts = _prompts(data)[:_ROWS]
    tokens = 0

    def sample() -> None:
        nonlocal tokens
        made = sample_completions(
            model, data.tokenizer, prompts, samples=1, max_new_tokens=_TOKENS, key="dry run",
            title="dry run: sampling",
        )  # fmt: skip
        tokens = sum(len(completion.ids) for completion in made)

    return _seconds(device, sample) / tokens


def _pairs(data: Any, callbacks: Sequence[Any], model: nn.Module) -> tuple[Sequence[Pair], bool]:
    if isinstance(data, FusionData):
        module: Any = data.trainer.lightning_module  # type: ignore[union-attr]
        return pairs_of_run(module)[: module.settings.batch_size], False
    sampler = sampler_of(callbacks)
    if sampler is not None and not hasattr(data, "train_pairs"):
        return _drawn(data.train_prompts(1)[: data.batch_size], sampler.max_new_tokens, model), True
    pairs: Any = data.train_pairs(1) if callable(data.train_pairs) else data.train_pairs
    return pairs[: data.batch_size], False


def _drawn(prompts: Sequence[Prompt], budget: int, model: nn.Module) -> list[Pair]:
    generator = torch.Generator().manual_seed(0)
    vocabulary: int = model.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
    answers = torch.randint(vocabulary, (2, len(prompts), budget), generator=generator)
    return [
        Pair(p.prompt_id, p.text, "", "", p.ids, tuple(chosen), tuple(rejected))
        for p, chosen, rejected in zip(prompts, *answers.tolist(), strict=True)
    ]


def _prompts(data: Any) -> list[Prompt]:
    asked = data.train_prompts(1) if hasattr(data, "train_prompts") else []
    return asked or [prompt for prompts in data.eval_prompts().values() for prompt in prompts]


def _seconds(device: torch.device, work: Callable[[], Any]) -> float:
    work()
    _wait(device)
    started = time.perf_counter()
    work()
    _wait(device)
    return time.perf_counter() - started


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
