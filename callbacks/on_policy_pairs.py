"""Pairs made from the policy's own completions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from tpmm_pl import processes
from tpmm_pl.callbacks.round_context import RoundContext
from tpmm_pl.callbacks.round_pairs import RoundPairs
from tpmm_pl.data.notices import say
from tpmm_pl.noise import LabelNoise
from tpmm_pl.pairing import Scored, check_method, pair_completions
from tpmm_pl.rollouts.generation import Generation, Policy, Sampling, TransformersGeneration
from tpmm_pl.rollouts.shards import Facts, Shard, fingerprint, read_shards, write_shard
from tpmm_pl.rollouts.sharing import dealt, shared
from tpmm_pl.rounds import one_hot
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
        generation: Who samples: transformers in this process, where nothing is given,
            :class:`tpmm_pl.rollouts.VLLMGeneration` or :class:`tpmm_pl.rollouts.ServerGeneration`.
        wait_for_shards: How many jobs of `tpmm pairs` sample and judge every round's training
            prompts: the fit ends in front of them and says what to run; 0 waits for none.
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
        generation: Generation | None = None,
        wait_for_shards: int = 0,
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
        self.generation = generation or TransformersGeneration()
        self.wait_for_shards = wait_for_shards

    def training_pairs(
        self, context: RoundContext, round_index: int, at_most: int | None = None
    ) -> list[Pair]:
        """Sample, judge and pair completions of a coming round's prompts, the first ``at_most``.

        What shards have of them is read.

        Raises:
            SystemExit: If shards are missing that are to be waited for; with the exit code 0.
        """
        noise = self.noise_in_rounds.get(round_index, self.noise)
        prompts = _data(context).train_prompts(round_index)[:at_most]
        self._wait_for_shards(context)
        known = processes.from_first(lambda: self._from_shards(context, prompts))
        return self._pairs(context, prompts, self.samples, noise, "pairs", known)

    def held_out_pairs(self, context: RoundContext) -> list[Pair]:
        """Sample, judge and pair completions of held-out prompts."""
        prompts = _data(context).fuse_prompts(context.round_index)
        return self._pairs(context, prompts, self.fuse_samples, self.noise, "fuse_pairs", {})

    def make_shard(
        self, context: RoundContext, round_index: int, shard: Shard, at_most: int | None = None
    ) -> Path:
        """Sample and judge a part of what :meth:`training_pairs` does; write it for that one.

        Args:
            context: Of the round before; the module holds the policy that starts the round.
            round_index: The coming round.
            shard: Which part.
            at_most: Of the round's prompts, as in :meth:`training_pairs`.

        Returns:
            The file.
        """
        prompts = _data(context).train_prompts(round_index)[:at_most]
        parts = dealt(prompts, shard.count, samples=self.samples, batch_size=self.batch_size)
        places = parts[shard.number - 1]
        path = shard.path(context.store.folder(context.round_index))
        part = [prompts[place] for place in places]
        judged = self.judged(context, part, self.samples, "pairs", path.stem)
        write_shard(path, places, judged, self._facts(context, prompts))
        return path

    def scored_under(self, context: RoundContext) -> Recipe | None:
        """Return the merge that has sampled: its log-probabilities come with the pairs.

        In float32 and by transformers; where rounding counts, training must see the numbers of its
        own kernels.
        """
        if not isinstance(self.generation, TransformersGeneration):
            return None
        parameter = next(context.policy.parameters())
        with context.fabric.autocast():
            rounded = torch.is_autocast_enabled(parameter.device.type)
        return None if rounded or parameter.dtype != torch.float32 else context.holds

    def judged(
        self, context: RoundContext, prompts: Sequence[Prompt], samples: int, stage: str, job: str
    ) -> list[Scored]:
        """Sample and judge completions of prompts, every process its part of them.

        Args:
            context: The module holds the policy.
            prompts: What to answer.
            samples: K.
            stage: Names the draw.
            job: Names what is made, on disk too; no two jobs on one run have the same.
        """
        policy = Policy(
            context.policy,
            context.data.tokenizer,
            context.store.root.parent / ".generation" / f"{context.round_index:03d}_{job}",
            context.passes,
        )
        sampling = Sampling(
            samples=samples,
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            key=context.key(stage),
            batch_size=self.batch_size,
            title=f"round {context.round_index}: sampling {job.replace('_', ' ')}",
        )

        def work(part: Sequence[Prompt]) -> list[Scored]:
            completions = self.generation(policy, part, sampling)
            scores = self.annotator(completions) if completions else []
            return list(zip(completions, scores, strict=True))

        return shared(prompts, work, samples=samples, batch_size=self.batch_size)

    def _pairs(
        self,
        context: RoundContext,
        prompts: Sequence[Prompt],
        samples: int,
        noise: LabelNoise,
        stage: str,
        known: Mapping[int, list[Scored]],
    ) -> list[Pair]:
        missing = [prompt for place, prompt in enumerate(prompts) if place not in known]
        made = iter(self.judged(context, missing, samples, stage, stage) if missing else [])
        judged: list[Scored] = []
        for place in range(len(prompts)):
            judged += known.get(place) or [next(made) for _ in range(samples)]
        completions = [completion for completion, _ in judged]
        pairs = pair_completions(
            completions,
            [score for _, score in judged],
            method=self.method,
            noise=noise,
            generator=context.generator(stage),
            min_margin=self.min_margin,
        )
        return with_sampler(pairs, completions)

    def _wait_for_shards(self, context: RoundContext) -> None:
        shards = [Shard(n, self.wait_for_shards) for n in range(1, self.wait_for_shards + 1)]
        folder, run = context.store.folder(context.round_index), context.store.root.parent
        missing = [str(one) for one in shards if not one.path(folder).exists()]
        if processes.from_first(lambda: missing):
            index = context.round_index + 1
            if processes.is_first():
                print(
                    f"round {index} waits for the completions of shard {', '.join(missing)}: run"
                    f" `tpmm pairs {run} --round {index} --shard {missing[0]}` and so on, then"
                    " this command again with --ckpt_path last",
                    flush=True,
                )
            raise SystemExit(0)

    def _from_shards(
        self, context: RoundContext, prompts: Sequence[Prompt]
    ) -> dict[int, list[Scored]]:
        folder = context.store.folder(context.round_index)
        known = read_shards(folder, prompts, self.samples, self._facts(context, prompts))
        if known:
            rest = len(prompts) - len(known)
            say(
                f"round {context.round_index + 1}: {len(known)} of {len(prompts)} prompts come"
                f" answered in shards, {rest or 'none'} are answered here"
            )
        return known

    def _facts(self, context: RoundContext, prompts: Sequence[Prompt]) -> Facts:
        policy = context.next_policy or one_hot(context.round_index)
        return {
            "key": context.key("pairs"),
            "policy": context.store.recipe_sha256(policy)[:16],
            "prompts": fingerprint([(prompt.prompt_id, prompt.ids) for prompt in prompts]),
            "samples": self.samples,
            "max_new_tokens": self.max_new_tokens,
            "temperature": self.temperature,
            "annotator": fingerprint(self.annotator),
            "generation": type(self.generation).__name__,
        }


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
