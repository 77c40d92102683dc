"""Reward models of the letters task: where they start, and the pairs they are trained on."""

from __future__ import annotations

import random
from hashlib import sha256
from typing import Literal

import torch

from tpmm_pl.data.packing import TOKEN_BUDGET
from tpmm_pl.data.rewards import RewardPairs
from tpmm_pl.models.reward import PretrainedReward
from tpmm_pl.moe.routing import MoESettings
from tpmm_pl.noise import LabelNoise
from tpmm_pl.pairing import pair_completions
from tpmm_pl.rounds import run_seed
from tpmm_pl.toy.judges import LettersGold, LettersProxy
from tpmm_pl.toy.letters import EOS, TOKEN_IDS, Domain, Split, demonstration
from tpmm_pl.toy.prompts import random_problem_of
from tpmm_pl.toy.start import LettersPolicy
from tpmm_pl.types import Completion, Judge, Pair, Prompt

_DOMAINS: tuple[Domain, Domain] = ("in_domain", "out_of_domain")


class LettersReward(PretrainedReward):
    """The letters policy's supervised start with a fresh score head.

    Args:
        start: The policy; by default the quickstart's.
        seed: Of the head.
        moe: Experts to upcycle it to; ``None``: it stays dense.
    """

    def __init__(
        self, start: LettersPolicy | None = None, seed: int = 0, moe: MoESettings | None = None
    ) -> None:
        self.policy = start or LettersPolicy()
        super().__init__(str(self.policy.folder), seed=seed, moe=moe)

    def prepare(self) -> None:
        """Train the start unless a run before has left it in the cache."""
        self.policy.prepare()


class LettersRewardData(RewardPairs):
    """Pairs of imperfect answers, labelled by annotators that err; nothing is downloaded.

    Training and held-out pairs have disjoint prompts, and neither has the evaluation's. The
    evaluation's pairs are labelled by the gold rule, which training never sees.

    Args:
        batch_size: Pairs an optimizer step.
        token_budget: Tokens that go through the model at once; a step of more is cut into
            micro-batches whose gradients add up.
        pairs: Pairs drawn; those of two equal answers are left out.
        split: ``train``, or ``fuse`` for the held-out pairs that experts are consolidated on.
        annotator: Labels training and held-out pairs.
        noise: How it errs.
        evaluation_pairs: Pairs drawn a domain.
    """

    def __init__(
        self,
        batch_size: int = 64,
        token_budget: int = TOKEN_BUDGET,
        pairs: int = 8192,
        split: Literal["train", "fuse"] = "train",
        annotator: Judge | None = None,
        noise: LabelNoise | None = None,
        evaluation_pairs: int = 1024,
    ) -> None:
        super().__init__(batch_size, token_budget)
        self.pairs = pairs
        self.split: Split = split
        self.annotator = annotator or LettersProxy()
        self.noise = noise or LabelNoise(temperature=0.1, flip=0.2)
        self.evaluation_pairs = evaluation_pairs

    def setup(self, stage: str) -> None:
        """Draw the pairs."""
        super().setup(stage)
        self.train_pairs = answer_pairs(
            f"{run_seed()}/reward", "in_domain", self.split, self.pairs, self.annotator, self.noise
        )
        self.eval_pairs = {
            domain: answer_pairs(
                "reward", domain, "eval", self.evaluation_pairs, LettersGold(), LabelNoise()
            )
            for domain in _DOMAINS
        }


def answer_pairs(
    key: str, domain: Domain, split: Split, count: int, judge: Judge, noise: LabelNoise
) -> list[Pair]:
    """Draw prompts with two imperfect answers each, as the supervised start gives them, and label.

    Args:
        key: Names the draws.
        domain: Of the prompts.
        split: Of the prompts; a prompt of one split is never in another.
        count: Prompts drawn; those with two equal answers, or a tie without noise, are left out.
        judge: Labels the pairs.
        noise: How it errs.
    """
    name = f"{key}/{split}/{domain}"
    generator = random.Random(name)
    completions = [
        completion
        for place in range(count)
        for completion in _two_answers(generator, f"{name}-{place:06d}", domain, split)
    ]
    seed = int.from_bytes(sha256(name.encode()).digest()[:7], "big")
    return pair_completions(
        completions,
        judge(completions),
        method="adjacent",
        noise=noise,
        generator=torch.Generator().manual_seed(seed),
    )


def _two_answers(
    generator: random.Random, prompt_id: str, domain: Domain, split: Split
) -> list[Completion]:
    words = random_problem_of(generator, domain, split)
    prompt = Prompt(prompt_id, " ".join(words), _ids(words))
    answers = [demonstration(generator, words) for _ in range(2)]
    return [
        Completion(prompt, index, _ids(answer), " ".join(answer[: answer.index(EOS)]), True, 0.0)
        for index, answer in enumerate(answers)
    ]


def _ids(words: list[str]) -> tuple[int, ...]:
    return tuple(TOKEN_IDS[word] for word in words)
