"""Pairs made from the policy's own completions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from tpmm_pl.callbacks.round_context import RoundContext
from tpmm_pl.callbacks.round_pairs import RoundPairs
from tpmm_pl.noise import LabelNoise
from tpmm_pl.pairing import check_method, pair_completions
from tpmm_pl.rollouts import sample_completions
from tpmm_pl.types import Completion, InputError, Judge, OffersPrompts, Pair, Prompt, Recipe


class OnPolicyPairs(RoundPairs):
    """Samples K completions a prompt, has them scored and pairs them.

    Training pairs of round t + 1 come from the policy that starts it; held-out pairs from the
    policy after round t, by the same annotator.

    Args:
        annotator: Scores completions for labels.
        method: Which completions of a prompt meet: ``best_worst``, ``best_random``, ``random``,
            ``adjacent``, ``all`` or ``margin``; see :func:`tpmm_pl.pairing.check_method`.
        min_margin: Pairs whose scores differ by less are left out.
        samples: K for training prompts.
        fuse_samples: K for held-out prompts.
        max_new_tokens: Budget of a completion.
        temperature: Of sampling.
        noise: How the annotator's labels err.
        flip_in_rounds: Another flip rate for the training pairs of some rounds, as when one batch
            of annotation goes wrong; fuse pairs keep ``noise``.
        batch_size: Completions generated at once; halved when memory runs out.
        train_on_fuse_pairs: See :class:`RoundPairs`.
    """

    from_data = False

    def __init__(
        self,
        annotator: Judge,
        method: str = "best_worst",
        min_margin: float = 0.0,
        samples: int = 8,
        fuse_samples: int = 2,
        max_new_tokens: int = 256,
        temperature: float = 1.0,
        noise: LabelNoise | None = None,
        flip_in_rounds: dict[int, float] | None = None,
        batch_size: int = 256,
        train_on_fuse_pairs: bool = False,
    ) -> None:
        super().__init__(train_on_fuse_pairs)
        check_method(method, min_margin)
        if samples < 2 or fuse_samples < 2:
            raise InputError(
                f"samples {samples} and fuse_samples {fuse_samples} must be at least 2 for a pair"
            )
        self.annotator = annotator
        self.method = method
        self.min_margin = min_margin
        self.samples = samples
        self.fuse_samples = fuse_samples
        self.max_new_tokens = max_new_tokens
        self.temperature = temperature
        self.noise = noise or LabelNoise()
        self.noise_in_rounds = {
            index: replace(self.noise, flip=flip) for index, flip in (flip_in_rounds or {}).items()
        }
        self.batch_size = batch_size

    def training_pairs(
        self, context: RoundContext, round_index: int, at_most: int | None = None
    ) -> list[Pair]:
        """Sample, judge and pair completions of a coming round's prompts, the first ``at_most``."""
        noise = self.noise_in_rounds.get(round_index, self.noise)
        prompts = _data(context).train_prompts(round_index)[:at_most]
        return self._pairs(context, prompts, self.samples, noise, "pairs")

    def held_out_pairs(self, context: RoundContext) -> list[Pair]:
        """Sample, judge and pair completions of held-out prompts."""
        prompts = _data(context).fuse_prompts(context.round_index)
        return self._pairs(context, prompts, self.fuse_samples, self.noise, "fuse_pairs")

    def scored_under(self, context: RoundContext) -> Recipe | None:
        """Return the merge that has sampled: its log-probabilities come with the pairs.

        In float32; where rounding counts, training must see the numbers of its own kernels.
        """
        parameter = next(context.policy.parameters())
        with context.fabric.autocast():
            rounded = torch.is_autocast_enabled(parameter.device.type)
        return None if rounded or parameter.dtype != torch.float32 else context.holds

    def _pairs(
        self,
        context: RoundContext,
        prompts: Sequence[Prompt],
        samples: int,
        noise: LabelNoise,
        stage: str,
    ) -> list[Pair]:
        with context.fabric.autocast():
            completions = sample_completions(
                context.policy,
                context.data.tokenizer,
                prompts,
                samples=samples,
                max_new_tokens=self.max_new_tokens,
                temperature=self.temperature,
                key=context.key(stage),
                batch_size=self.batch_size,
                title=f"round {context.round_index}: sampling {stage.replace('_', ' ')}",
            )
        pairs = pair_completions(
            completions,
            self.annotator(completions),
            method=self.method,
            noise=noise,
            generator=context.generator(stage),
            min_margin=self.min_margin,
        )
        return with_sampler(pairs, completions)


def with_sampler(pairs: Sequence[Pair], completions: Sequence[Completion]) -> list[Pair]:
    """Return pairs with the log-probabilities that sampling has kept of their completions."""
    logps = {(c.prompt.prompt_id, c.ids): c.logps for c in completions}
    return [
        replace(
            pair,
            ref_chosen_logps=logps[pair.prompt_id, pair.chosen_ids],
            ref_rejected_logps=logps[pair.prompt_id, pair.rejected_ids],
        )
        for pair in pairs
    ]


def _data(context: RoundContext) -> OffersPrompts:
    if not isinstance(context.data, OffersPrompts):
        raise InputError(
            f"OnPolicyPairs needs data with prompts, and {type(context.data).__name__} has none; "
            "use OfflinePairs for pairs from a file"
        )
    return context.data
