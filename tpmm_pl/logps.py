"""Log-probabilities of completions, with the head on completion positions only."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tpmm_pl.types import IGNORE_INDEX, PairLogps

LOGITS_BUDGET = 1 << 30
"""Bytes of float32 logits held at once; larger batches are cut and recomputed in the backward."""


def token_logps(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the log-probability of each target token in nats.

    Args:
        logits: Unnormalised scores, ``(M, V)``, any float dtype; reduced in float32.
        targets: Token ids, ``(M,)`` int64.

    Returns:
        ``(M,)`` float32.
    """
    scores = logits.float()
    # gather before logsumexp: no (M, V) tensor of log-probabilities is ever held
    return scores.gather(-1, targets[:, None]).squeeze(-1) - scores.logsumexp(-1)


def sequence_logps(logits: Tensor, labels: Tensor) -> Tensor:
    """Sum the log-probability of every labelled token in each row.

    The shift happens here: position ``t`` of ``logits`` predicts position ``t + 1`` of ``labels``.

    Args:
        logits: Unnormalised scores, ``(N, T, V)``, any float dtype; reduced in float32.
        labels: Token ids, ``(N, T)``; ``IGNORE_INDEX`` marks prompt and padding.

    Returns:
        Log-probabilities in nats, ``(N,)``, float32; 0 for a row without labelled tokens.

    Raises:
        ValueError: If ``logits`` and ``labels`` disagree on ``(N, T)``.
    """
    if logits.shape[:2] != labels.shape:
        raise ValueError(f"logits {tuple(logits.shape)} but labels {tuple(labels.shape)}")
    return completion_logps(logits, labels, head=lambda scores: scores)


def completion_logps(
    hidden: Tensor,
    labels: Tensor,
    head: Callable[[Tensor], Tensor],
    *,
    vocabulary: int = 0,
    budget: int = LOGITS_BUDGET,
) -> Tensor:
    """Apply ``head`` to the positions that predict a labelled token, and sum by row.

    Args:
        hidden: Last hidden states, ``(N, T, H)``.
        labels: Token ids, ``(N, T)``; ``IGNORE_INDEX`` marks prompt and padding.
        head: From ``(M, H)`` to logits ``(M, V)``.
        vocabulary: V, with which the size of the logits is foreseen; 0: never cut.
        budget: Bytes of float32 logits above which positions are cut into chunks that are
            recomputed in the backward pass.

    Returns:
        Log-probabilities in nats, ``(N,)`` float32, summed in float64.
    """
    predicted = labels[:, 1:] != IGNORE_INDEX
    rows = predicted.nonzero()[:, 0]
    states = hidden[:, :-1][predicted]
    targets = labels[:, 1:][predicted]

    def of_chunk(states: Tensor, targets: Tensor) -> Tensor:
        return token_logps(head(states), targets)

    size = max(1, budget // (4 * vocabulary)) if vocabulary else max(1, len(targets))
    if len(targets) <= size:
        logps = of_chunk(states, targets)
    else:
        chunks = zip(states.split(size), targets.split(size), strict=True)
        logps = torch.cat([_recomputed(of_chunk, *chunk) for chunk in chunks])
    # float64: a float32 sum over a long completion loses up to 6e-6 of the loss
    sums = torch.zeros(len(labels), dtype=torch.float64, device=logps.device)
    return sums.index_add(0, rows, logps.double()).float()


def _recomputed(function: Callable[[Tensor, Tensor], Tensor], a: Tensor, b: Tensor) -> Tensor:
    if not torch.is_grad_enabled():
        return function(a, b)
    result: Tensor = checkpoint(function, a, b, use_reentrant=False)
    return result


def split_pairs(values: Tensor) -> PairLogps:
    """Cut ``(N,)`` values of stacked rows into chosen and rejected, each ``(B,)``."""
    chosen, rejected = values.chunk(2)
    return PairLogps(chosen, rejected)


def completion_tokens(labels: Tensor) -> Tensor:
    """Count the labelled tokens of each row that are predicted, ``(N,)`` float32."""
    return (labels[:, 1:] != IGNORE_INDEX).sum(-1).float()
