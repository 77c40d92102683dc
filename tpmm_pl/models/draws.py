"""Draws from a softmax whose noise is a function of (key, position, token) alone."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import sha256
from typing import NamedTuple

import torch
from torch import Tensor

_CHUNK = 1 << 20
"""Scores."""


class Draws(NamedTuple):
    """One token a row."""

    tokens: Tensor
    """``(N,)`` int64."""
    logps: Tensor
    """``(N,)`` float32, log-probabilities in nats at temperature 1."""


def draw_tokens(scores: Tensor, keys: Tensor, position: int, temperature: float) -> Draws:
    """Draw each row's token: the winner of an exponential race (the Gumbel-max trick).

    Of exponential times ``E_v / p_v`` the smallest is that of token ``v`` with probability
    ``p_v``. Neither the batch nor a global generator can change a draw, and scores that hardly
    differ hardly ever draw different tokens: the same noise makes policies comparable.

    Args:
        scores: Logits, ``(N, V)``, any float dtype.
        keys: Of the rows, ``(N,)`` int64.
        position: Of the token in its completion, from 0.
        temperature: Divides the logits; 0 takes the most likely token.
    """
    # on the CPU in chunks that stay in its cache; elsewhere a kernel launched costs more
    chunk = max(1, _CHUNK // scores.shape[1]) if scores.device.type == "cpu" else len(scores)
    rows = zip(scores.split(chunk), keys.split(chunk), strict=True)
    parts = [_draw(of_rows, some, position, temperature) for of_rows, some in rows]
    return Draws(*(torch.cat(column) for column in zip(*parts, strict=True)))


def _draw(scores: Tensor, keys: Tensor, position: int, temperature: float) -> Draws:
    logps = scores.float().log_softmax(-1)
    if temperature:
        likeliest = logps.amax(-1, keepdim=True)
        weights = logps.sub(likeliest).div_(temperature).exp_()
        tokens = weights.div_(exponential_noise(keys, position, scores.shape[1])).argmax(-1)
    else:
        tokens = logps.argmax(-1)
    return Draws(tokens, logps.gather(1, tokens[:, None]).squeeze(1))


def row_keys(names: Sequence[str], device: torch.device) -> Tensor:
    """Hash names to keys, ``(N,)`` int64."""
    digests = [sha256(name.encode()).digest()[:8] for name in names]
    return torch.tensor([int.from_bytes(d, "big", signed=True) for d in digests], device=device)


def exponential_noise(keys: Tensor, position: int, vocabulary: int) -> Tensor:
    """Return standard exponential noise, a function of (key, position, token).

    A counter-based hash: 64 bits of key and position, then 32-bit arithmetic a token, which
    makes large vocabularies cheap. The smallest time is 2^-32: tokens of a probability far below
    it are never drawn.

    Args:
        keys: ``(N,)`` int64.
        position: Of the token in its completion.
        vocabulary: V.

    Returns:
        ``(N, V)`` float32, positive and finite.
    """
    steps = torch.full_like(keys, position + 1) * _WEYL
    state = _mix_64(keys + steps)[:, None]
    tokens = torch.arange(vocabulary, dtype=torch.int32, device=keys.device)
    bits = _mix_32(tokens + (state >> 32).int(), state.int())
    uniform = bits.bitwise_and_(0x7FFFFFFF).float().add_(0.5).mul_(2.0**-31)
    # rounding reaches 1, whose logarithm is infinite
    return uniform.clamp_(max=1 - 2.0**-24).neg_().log1p_().neg_()


_WEYL = 0x9E3779B97F4A7C15 - (1 << 64)


def _mix_64(x: Tensor) -> Tensor:
    # the finaliser of SplitMix64 (Steele et al. 2014) in wrapping int64 arithmetic
    scratch = torch.empty_like(x)
    x = _fold_(x.clone(), 30, scratch).mul_(0xBF58476D1CE4E5B9 - (1 << 64))
    x = _fold_(x, 27, scratch).mul_(0x94D049BB133111EB - (1 << 64))
    return _fold_(x, 31, scratch)


def _mix_32(x: Tensor, key: Tensor) -> Tensor:
    # constants of Wellons' hash prospector; keyed in between, so that rows whose counters overlap
    # are unrelated
    scratch = torch.empty_like(x)
    x = _fold_(x, 16, scratch).mul_(0x21F0AAAD).bitwise_xor_(key)
    x = _fold_(x, 15, scratch).mul_(0xD35A2D97 - (1 << 32))
    return _fold_(x, 15, scratch)


def _fold_(x: Tensor, bits: int, scratch: Tensor) -> Tensor:
    # x ^= x >> bits, logically: shifts of signed integers copy the sign downwards. In place,
    # because fresh memory costs as much as the arithmetic
    torch.bitwise_right_shift(x, bits, out=scratch)
    width = 8 * x.element_size()
    return x.bitwise_xor_(scratch.bitwise_and_((1 << (width - bits)) - 1))
