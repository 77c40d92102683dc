"""What a loss takes of a scored batch: sums or means over tokens, with the reference or without."""

from __future__ import annotations

from collections.abc import Callable

from tpmm_pl.types import PairLogps

Inputs = Callable[[PairLogps, PairLogps, PairLogps], tuple[PairLogps, ...]]
"""From policy, reference and the completions' token counts to the arguments of a loss."""


def sums(policy: PairLogps, reference: PairLogps, tokens: PairLogps) -> tuple[PairLogps, ...]:
    """Pass on policy and reference as they are."""
    return policy, reference


def means(policy: PairLogps, reference: PairLogps, tokens: PairLogps) -> tuple[PairLogps, ...]:
    """Pass on policy and reference per token."""
    return per_token(policy, tokens), per_token(reference, tokens)


def policy_means(
    policy: PairLogps, reference: PairLogps, tokens: PairLogps
) -> tuple[PairLogps, ...]:
    """Pass on the policy per token; the reference is not read."""
    return (per_token(policy, tokens),)


def policy_and_tokens(
    policy: PairLogps, reference: PairLogps, tokens: PairLogps
) -> tuple[PairLogps, ...]:
    """Pass on the policy and the token counts; the reference is not read."""
    return policy, tokens


def per_token(logps: PairLogps, tokens: PairLogps) -> PairLogps:
    """Divide log-probabilities by the completions' tokens: nats a token, ``(B,)`` each."""
    return PairLogps(logps.chosen / tokens.chosen, logps.rejected / tokens.rejected)
