"""Prompts dealt out in whole batches, so that who answers a batch changes no bit of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain
from math import ceil
from typing import Any, TypeVar

from torch import nn
from transformers import PreTrainedTokenizerBase

from tpmm_pl import processes
from tpmm_pl.rollouts.sampling import by_length, sample_completions
from tpmm_pl.types import Completion, Prompt

T = TypeVar("T")


def sample_shared(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    *,
    samples: int,
    batch_size: int = 256,
    **settings: Any,
) -> list[Completion]:
    """Sample completions in all processes, each its part of the prompts; return all of them.

    Args:
        model: Holds whole weights, the same in every process.
        tokenizer: Decodes.
        prompts: What to answer, the same in every process.
        samples: K, completions a prompt.
        batch_size: Rows a process generates at once.
        settings: Others of :func:`tpmm_pl.rollouts.sampling.sample_completions`.

    Returns:
        What that function returns for all prompts, on every process.
    """

    def work(part: Sequence[Prompt]) -> list[Completion]:
        return sample_completions(
            model, tokenizer, part, samples=samples, batch_size=batch_size, **settings
        )

    return shared(prompts, work, samples=samples, batch_size=batch_size)


def shared(
    prompts: Sequence[Prompt],
    work: Callable[[Sequence[Prompt]], Sequence[T]],
    *,
    samples: int,
    batch_size: int,
) -> list[T]:
    """Have each process work on its part of the prompts; return all results in order.

    Args:
        prompts: The same in every process.
        work: From some of the prompts to ``samples`` results a prompt, in order.
        samples: Results a prompt.
        batch_size: Results made at once.
    """
    parts = dealt(prompts, processes.count(), samples=samples, batch_size=batch_size)
    mine = work([prompts[place] for place in parts[processes.rank()]])
    made = chain.from_iterable(processes.from_each(list(mine)))
    # of each part in its order, one prompt's results after the other's
    found = {place: [next(made) for _ in range(samples)] for part in parts for place in part}
    return [result for place in range(len(prompts)) for result in found[place]]


def dealt(
    prompts: Sequence[Prompt], parts: int, *, samples: int, batch_size: int
) -> list[list[int]]:
    """Deal prompts out to ``parts`` in the batches that sampling makes of all of them.

    The results of a batch do not depend on who computes it, to the last bit. Only where there are
    fewer batches than parts they are made smaller, so that no part is idle.

    Args:
        prompts: What to deal.
        parts: How many parts.
        samples: Completions a prompt.
        batch_size: Completions of a batch.

    Returns:
        The places of each part's prompts.
    """
    size = max(1, min(batch_size // samples, ceil(len(prompts) / parts)))
    order = by_length([prompt.ids for prompt in prompts])
    batches = [order[start : start + size] for start in range(0, len(order), size)]
    return [list(chain.from_iterable(batches[part::parts])) for part in range(parts)]
