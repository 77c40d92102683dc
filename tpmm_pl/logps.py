"""Log-probabilities of completions, with the head on the positions that predict them only."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor, Partial

from tpmm_pl.types import IGNORE_INDEX, PairLogps

LOGITS_BUDGET = 1 << 30
"""Bytes of logits kept for the backward pass; above it they are made again, chunk by chunk."""

_CACHED = 1 << 19
"""Logits reduced at once on a processor, so that passes over them find them in its cache."""

_WIDENED = 1 << 26
"""The same elsewhere: 256 MiB where they are widened to float32."""


def head_logps(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state_of: Tensor,
    targets: Tensor,
    *,
    budget: int = LOGITS_BUDGET,
) -> Tensor:
    """Apply a linear head to hidden states; return log-probabilities of the tokens they predict.

    One differentiable function: no log-probability is held but those asked for, the logits become
    their own gradient in place, and a frozen head gets none. Logits have the dtype of autocast
    where it is on, the sums over the vocabulary float32. Above ``budget`` they are made in chunks,
    and once more in the backward pass.

    Args:
        hidden: ``(U, H)``.
        weight: ``(V, H)``; sharded, it is gathered once, and the processes' gradients averaged.
        bias: ``(V,)`` or ``None``; the same.
        state_of: Which of the hidden states predicts each token, ``(S,)`` int64.
        targets: The tokens, ``(S,)`` int64.
        budget: Bytes of logits.

    Returns:
        Log-probabilities in nats, ``(S,)`` float32.
    """
    weight, bias = _gathered(weight), None if bias is None else _gathered(bias)
    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    apply: Callable[..., Tensor] = _Head.apply
    rows = max(1, budget // (hidden.element_size() * len(weight)))
    if len(hidden) <= rows:
        return apply(hidden, weight, bias, state_of, targets, True)
    # tokens are not sorted by state: each chunk takes those of its own
    result = hidden.new_zeros(len(targets), dtype=torch.float32)
    for start, states in enumerate(hidden.split(rows)):
        chosen = (state_of // rows == start).nonzero()[:, 0]
        of_chunk = state_of[chosen] - start * rows
        logps = apply(states, weight, bias, of_chunk, targets[chosen], False)
        result = result.index_put((chosen,), logps)
    return result


class _Head(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        state_of: Tensor,
        targets: Tensor,
        keep: bool,
    ) -> Tensor:
        logits = F.linear(hidden, weight, bias)
        sums = _log_sums(logits)
        logps = logits[state_of, targets].float() - sums[state_of]
        ctx.save_for_backward(hidden, weight, bias, state_of, targets, sums)
        ctx.logits = logits if keep and any(ctx.needs_input_grad) else None
        return logps

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        hidden, weight, bias, state_of, targets, sums = ctx.saved_tensors
        logits, ctx.logits = ctx.logits, None
        if logits is None:
            logits = F.linear(hidden, weight, bias)
        _differentiate(logits, sums, state_of, targets, gradient)
        needs = ctx.needs_input_grad
        return (
            logits @ weight if needs[0] else None,
            logits.mT @ hidden if needs[1] else None,
            logits.sum(0) if needs[2] else None,
            None,
            None,
            None,
        )


def _gathered(parameter: Tensor) -> Tensor:
    if not isinstance(parameter, DTensor):
        return parameter
    # every process has a batch of its own; without a placement each would keep its own gradient
    average = [Partial("avg")] * parameter.device_mesh.ndim
    return parameter.full_tensor(grad_placements=average)


def _differentiate(
    logits: Tensor, sums: Tensor, state_of: Tensor, targets: Tensor, gradient: Tensor
) -> None:
    # in place, of a log-probability by its logits: 1 at the target, less the softmax
    share = torch.zeros_like(sums).index_add_(0, state_of, gradient)
    start = 0
    for part, norm, of_part in zip(*map(_blocks(logits), (logits, sums, share)), strict=True):
        # float32 until all is added up: of a likely token, a lower precision would lose 1 - p
        scores = part.float().sub_(norm[:, None]).exp_().mul_(-of_part[:, None])
        state = state_of - start
        inside = (state >= 0) & (state < len(part))
        # other blocks' tokens add 0; to leave them out, a device would have to count them first
        places = (state.clamp(0, len(part) - 1), targets)
        scores.index_put_(places, gradient * inside, accumulate=True)
        part.copy_(scores)
        start += len(part)


def _log_sums(logits: Tensor) -> Tensor:
    # (U,) float32; a lower precision is widened block by block, never as a whole
    return torch.cat([part.float().logsumexp(-1) for part in _blocks(logits)(logits)])


def _blocks(logits: Tensor) -> Callable[[Tensor], tuple[Tensor, ...]]:
    elements = _CACHED if logits.is_cpu else _WIDENED
    size = max(1, elements // logits.shape[1])
    return lambda tensor: tensor.split(size)


def token_logps(logits: Tensor, state_of: Tensor, targets: Tensor) -> Tensor:
    """Return the log-probabilities of tokens from the logits of the states that predict them.

    Args:
        logits: ``(U, V)``, any float dtype; reduced in float32.
        state_of: Row of ``logits`` of each token, ``(S,)`` int64.
        targets: The tokens, ``(S,)`` int64.

    Returns:
        In nats, ``(S,)`` float32.
    """
    scores = logits.float()
    # gather before logsumexp: no (U, V) tensor of log-probabilities is ever held
    return scores[state_of, targets] - scores.logsumexp(-1)[state_of]


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
    predicted = labels[:, 1:] != IGNORE_INDEX
    targets = labels[:, 1:][predicted]
    each = torch.arange(len(targets), device=labels.device)
    logps = token_logps(logits[:, :-1][predicted], each, targets).double()
    sums = torch.zeros(len(labels), dtype=torch.float64, device=logps.device)
    return sums.index_add(0, predicted.nonzero()[:, 0], logps).float()


def split_pairs(values: Tensor) -> PairLogps:
    """Cut ``(N,)`` values of stacked rows into chosen and rejected, each ``(B,)``."""
    chosen, rejected = values.chunk(2)
    return PairLogps(chosen, rejected)
