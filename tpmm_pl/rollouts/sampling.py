"""Sampled completions whose noise is a function of the prompt, not of the batch."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from functools import cache

import torch
from lightning.pytorch.utilities.memory import is_oom_error
from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from tpmm_pl.data.notices import say
from tpmm_pl.models.decoding import Decoding, Tokens, decode, decode_with_generate, shares_prefill
from tpmm_pl.models.draws import row_keys
from tpmm_pl.modes import evaluating
from tpmm_pl.types import Completion, Prompt

logger = logging.getLogger(__name__)


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

    Samples of one prompt share its prefill, where the model has a cache of keys and values. A
    batch that does not fit into memory is halved. Tokens a second stand behind the progress bar
    and in the log of this module, level INFO.

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
    order = by_length([prompt.ids for prompt, _ in jobs])
    done: dict[int, Completion] = {}
    settings = Decoding(
        max_new_tokens, end_ids(model, tokenizer), tokenizer.pad_token_id, temperature
    )
    started, tokens = time.perf_counter(), 0
    bar = tqdm(total=len(jobs), desc=title, unit="completion", leave=False, disable=None)
    with bar, evaluating(model):
        while order:
            # whole prompts where one fits: the next batch would prefill the last one again
            chosen = order[: batch_size - batch_size % samples or batch_size]
            batch = _complete_if_it_fits(model, tokenizer, [jobs[i] for i in chosen], key, settings)
            if batch is None:
                batch_size = len(chosen) // 2
                _release_memory()
                logger.info("%s: out of memory, %d at once from here on", title, batch_size)
                continue
            done.update(zip(chosen, batch, strict=True))
            order = order[len(chosen) :]
            tokens += sum(len(completion.ids) for completion in batch)
            bar.set_postfix_str(_speed(tokens, started), refresh=False)
            bar.update(len(chosen))
    logger.info("%s: %d tokens, %s", title, tokens, _speed(tokens, started))
    return [done[i] for i in range(len(jobs))]


def by_length(rows: Sequence[Tokens]) -> list[int]:
    """Return the places of rows of tokens, short ones first and equal ones together."""
    return sorted(range(len(rows)), key=lambda i: (len(rows[i]), rows[i]))


def _complete_if_it_fits(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    jobs: Sequence[tuple[Prompt, int]],
    key: str,
    settings: Decoding,
) -> list[Completion] | None:
    try:
        return _complete(model, tokenizer, jobs, key, settings)
    except RuntimeError as error:
        if len(jobs) == 1 or not _is_out_of_memory(error):
            raise
    # the error is gone by now, and with its traceback all that the batch has left in memory
    return None


def _complete(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    jobs: Sequence[tuple[Prompt, int]],
    key: str,
    settings: Decoding,
) -> list[Completion]:
    way = decode
    if not shares_prefill(model):
        _say_prompts_are_not_shared(type(model).__name__)
        way = decode_with_generate
    names = [f"{key}/{prompt.prompt_id}/{index}" for prompt, index in jobs]
    keys = row_keys(names, next(model.parameters()).device)
    made = way(model, [prompt.ids for prompt, _ in jobs], keys, settings)
    return [
        completion(*job, ids, logps, tokenizer, settings.end_ids)
        for job, (ids, logps) in zip(jobs, made, strict=True)
    ]


def completion(
    prompt: Prompt,
    index: int,
    ids: Sequence[int],
    logps: Sequence[float],
    tokenizer: PreTrainedTokenizerBase,
    ends: Tokens,
) -> Completion:
    """Return a completion from its tokens and their log-probabilities.

    Args:
        prompt: What it answers.
        index: Which of the prompt's samples.
        ids: At least one token; the end token included where it was sampled.
        logps: In nats at temperature 1, one a token.
        tokenizer: Decodes.
        ends: Tokens that end a completion.
    """
    text = str(tokenizer.decode(list(ids), skip_special_tokens=True))
    return Completion(prompt, index, tuple(ids), text, ids[-1] in ends, sum(logps))


def end_ids(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> Tokens:
    """Return the tokens that end a completion: the model's and the tokenizer's."""
    config = getattr(model, "generation_config", None)
    ends = getattr(config, "eos_token_id", None)
    known = ends if isinstance(ends, list) else [ends]
    return tuple(sorted({int(e) for e in [*known, tokenizer.eos_token_id] if e is not None}))


def _speed(tokens: int, started: float) -> str:
    return f"{tokens / (time.perf_counter() - started):,.0f} tokens/s"


def _release_memory() -> None:
    # blocks cut for the larger batch may not fit the smaller ones
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _is_out_of_memory(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or is_oom_error(error)


@cache
def _say_prompts_are_not_shared(name: str) -> None:
    say(f"{name} has no cache of keys and values: each sample of a prompt reads it anew")
