"""Prompts of the letters task for training, fusion and evaluation.

Each is a function of its arguments only. A hash of the text keeps the uses apart
(:func:`~tpmm_pl.toy.letters.split_of`): whatever the seeds and rounds are, a prompt of one use
never turns up in another.
"""

from __future__ import annotations

import random

from transformers import PreTrainedTokenizerBase

from tpmm_pl.toy.letters import Domain, Split, random_problem, split_of
from tpmm_pl.types import Prompt


def round_prompts(
    seed: int, round_index: int, count: int, tokenizer: PreTrainedTokenizerBase
) -> list[Prompt]:
    """Return in-domain prompts for the training pairs of a round.

    No text comes twice in one round; rounds may share a few of the shortest.

    Args:
        seed: The run's seed.
        round_index: The round that trains on the pairs, or after which they are held out.
        count: How many.
        tokenizer: The policy's tokenizer.
    """
    name = f"round-{round_index:03d}"
    return _prompts(f"{seed}/{name}", name, "train", "in_domain", count, tokenizer)


def fuse_prompts(
    seed: int, round_index: int, count: int, tokenizer: PreTrainedTokenizerBase
) -> list[Prompt]:
    """Return in-domain prompts for the held-out pairs that a round's merge is learned from.

    The arguments are those of :func:`round_prompts`.
    """
    name = f"fuse-{round_index:03d}"
    return _prompts(f"{seed}/{name}", name, "fuse", "in_domain", count, tokenizer)


def eval_prompts(
    domain: Domain, seed: int, count: int, tokenizer: PreTrainedTokenizerBase
) -> list[Prompt]:
    """Return prompts for evaluation.

    Args:
        domain: In domain or out of domain.
        seed: The evaluation's own seed: runs are comparable when they share it.
        count: How many.
        tokenizer: The policy's tokenizer.
    """
    name = f"eval-{domain}"
    return _prompts(f"{seed}/{name}", name, "eval", domain, count, tokenizer)


def random_problem_of(generator: random.Random, domain: Domain, split: Split) -> list[str]:
    """Draw the words of a prompt until one falls into ``split``."""
    while True:
        words = random_problem(generator, domain)
        if split_of(" ".join(words)) == split:
            return words


def _prompts(
    key: str,
    name: str,
    split: Split,
    domain: Domain,
    count: int,
    tokenizer: PreTrainedTokenizerBase,
) -> list[Prompt]:
    generator = random.Random(key)
    texts: dict[str, None] = {}
    while len(texts) < count:
        texts[" ".join(random_problem_of(generator, domain, split))] = None
    return [
        Prompt(f"{name}-{place:04d}", text, tuple(tokenizer.encode(text, add_special_tokens=False)))
        for place, text in enumerate(texts)
    ]
