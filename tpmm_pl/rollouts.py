"""Sampled completions whose noise is a function of the prompt, not of the batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from hashlib import sha256
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedTokenizerBase,
)

from tpmm_pl.types import Completion, Prompt


def sample_completions(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    *,
    samples: int,
    max_new_tokens: int,
    key: str,
    temperature: float = 1.0,
    batch_size: int = 256,
    title: str = "sampling",
) -> list[Completion]:
    """Sample completions; the same key gives the same noise whatever the batch size.

    A batch that does not fit into memory is halved.

    Args:
        model: A causal language model with ``generate``.
        tokenizer: Decodes; its padding and end tokens are used.
        prompts: What to answer.
        samples: K, completions a prompt.
        max_new_tokens: Budget of a completion, end token included.
        key: Names the draw, as ``"<seed>/<round>/<stage>"``.
        temperature: 0 takes the most likely token (greedy).
        batch_size: Rows generated at once.
        title: Shown before the progress bar.

    Returns:
        ``len(prompts) * samples`` completions, all of a prompt together, in order.
    """
    jobs = [(prompt, index) for prompt in prompts for index in range(samples)]
    order = sorted(range(len(jobs)), key=lambda i: len(jobs[i][0].ids))
    done: dict[int, Completion] = {}
    device = next(model.parameters()).device
    bar = tqdm(total=len(jobs), desc=title, unit="completion", leave=False, disable=None)
    with bar, _evaluating(model):
        while order:
            chosen = order[:batch_size]
            try:
                batch = _generate(
                    model, tokenizer, [jobs[i] for i in chosen],
                    max_new_tokens=max_new_tokens, key=key, temperature=temperature, device=device,
                )  # fmt: skip
            except torch.OutOfMemoryError:
                if batch_size == 1:
                    raise
                batch_size = max(1, batch_size // 2)
                continue
            done.update(zip(chosen, batch, strict=True))
            order = order[len(chosen) :]
            bar.update(len(chosen))
    return [done[i] for i in range(len(jobs))]


@torch.no_grad()
def _generate(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    jobs: Sequence[tuple[Prompt, int]],
    *,
    max_new_tokens: int,
    key: str,
    temperature: float,
    device: torch.device,
) -> list[Completion]:
    ends = _end_ids(model, tokenizer)
    pad: int = tokenizer.pad_token_id
    width = max(len(prompt.ids) for prompt, _ in jobs)
    rows = [[pad] * (width - len(prompt.ids)) + list(prompt.ids) for prompt, _ in jobs]
    mask = [[0] * (width - len(prompt.ids)) + [1] * len(prompt.ids) for prompt, _ in jobs]
    draw = KeyedSampling([f"{key}/{p.prompt_id}/{k}" for p, k in jobs], width, temperature, device)
    with _plain_generation(model):
        generated = model.generate(  # type: ignore[operator]
            input_ids=torch.tensor(rows, device=device),
            attention_mask=torch.tensor(mask, device=device),
            logits_processor=LogitsProcessorList([draw]),
            generation_config=GenerationConfig(
                do_sample=False, max_new_tokens=max_new_tokens, eos_token_id=ends, pad_token_id=pad
            ),
        )
    tokens = generated[:, width:].tolist()
    logps = torch.stack(draw.logps, dim=1).tolist()
    completions = []
    for (prompt, k), row, row_logps in zip(jobs, tokens, logps, strict=True):
        length = next((i + 1 for i, token in enumerate(row) if token in ends), len(row))
        ids = tuple(row[:length])
        text = str(tokenizer.decode(list(ids), skip_special_tokens=True))
        finished = ids[-1] in ends
        completions.append(Completion(prompt, k, ids, text, finished, sum(row_logps[:length])))
    return completions


class KeyedSampling(LogitsProcessor):
    """Turns arg-max decoding into sampling by keyed Gumbel noise (Gumbel 1954).

    The noise of a row is a function of (its key, position, token) alone: a counter-based hash,
    so neither the batch nor a global generator can change a draw. Also keeps the log-probability
    in nats of each token drawn.

    Args:
        keys: One a row.
        prompt_width: Tokens of the padded prompts.
        temperature: Divides the logits before the noise; 0 adds no noise.
        device: Of the noise.
    """

    def __init__(
        self, keys: Sequence[str], prompt_width: int, temperature: float, device: torch.device
    ) -> None:
        digests = [int.from_bytes(sha256(key.encode()).digest()[:8], "big") for key in keys]
        self._keys = torch.tensor([d - (1 << 63) for d in digests], device=device)
        self._prompt_width = prompt_width
        self._temperature = temperature
        self.logps: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return noisy scores whose arg-max is a draw from the softmax, ``(N, V)``."""
        scores = scores.float()
        noisy = scores
        if self._temperature:
            position = input_ids.shape[1] - self._prompt_width
            noisy = scores / self._temperature + gumbel_noise(self._keys, position, scores.shape[1])
        picked = noisy.argmax(-1, keepdim=True)
        self.logps.append(scores.gather(1, picked).squeeze(1) - scores.logsumexp(-1))
        return noisy


def gumbel_noise(keys: Tensor, position: int, vocabulary: int) -> Tensor:
    """Return standard Gumbel noise as a function of (key, position, token), ``(N, V)`` float32.

    Args:
        keys: ``(N,)`` int64.
        position: Of the token in its completion.
        vocabulary: V.
    """
    tokens = torch.arange(vocabulary, device=keys.device)
    steps = torch.full_like(keys, position + 1) * _WEYL
    bits = _mix(_mix(keys + steps)[:, None] + tokens * _WEYL)
    uniform = ((bits >> 11) & ((1 << 53) - 1)).double().add_(0.5).mul_(2.0**-53)
    return -torch.log(-torch.log(uniform)).float()


_WEYL = 0x9E3779B97F4A7C15 - (1 << 64)
_FIRST = 0xBF58476D1CE4E5B9 - (1 << 64)
_SECOND = 0x94D049BB133111EB - (1 << 64)


def _mix(x: Tensor) -> Tensor:
    # the finaliser of SplitMix64 (Steele et al. 2014) in wrapping int64 arithmetic
    x = (x ^ _shifted(x, 30)) * _FIRST
    x = (x ^ _shifted(x, 27)) * _SECOND
    return x ^ _shifted(x, 31)


def _shifted(x: Tensor, bits: int) -> Tensor:
    # int64 shifts copy the sign downwards; the mask makes the shift logical
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _end_ids(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    config = getattr(model, "generation_config", None)
    ends = getattr(config, "eos_token_id", None)
    known = ends if isinstance(ends, list) else [ends]
    return sorted({int(end) for end in [*known, tokenizer.eos_token_id] if end is not None})


@contextmanager
def _plain_generation(model: nn.Module) -> Iterator[None]:
    # `generate` fills unset fields from the model's own: penalties and beams from its repository
    # would bend the softmax that is sampled and recorded
    owner: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    asked, owner.generation_config = owner.generation_config, GenerationConfig()
    try:
        yield
    finally:
        owner.generation_config = asked


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
