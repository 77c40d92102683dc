"""The data module of the letters task."""

from __future__ import annotations

from collections.abc import Mapping

from tpmm_pl.data.module import RunData
from tpmm_pl.data.packing import TOKEN_BUDGET
from tpmm_pl.rounds import run_seed
from tpmm_pl.toy import prompts
from tpmm_pl.toy.letters import Domain
from tpmm_pl.types import Prompt

_DOMAINS: tuple[Domain, Domain] = ("in_domain", "out_of_domain")


class LettersData(RunData):
    """Fresh prompts of the letters task for every round; nothing is downloaded.

    ``prepare_data`` trains the supervised start of :class:`tpmm_pl.toy.start.LettersPolicy`
    unless a run before has left it in the cache.

    Args:
        batch_size: Pairs an optimizer step.
        token_budget: Tokens that go through the model at once; a step of more is cut into
            micro-batches whose gradients add up.
        prompts_per_round: Prompts of a round's training pairs.
        start_fuse_prompts: Held-out prompts answered by the starting policy.
        fuse_prompts_per_round: Held-out prompts answered by every later policy.
        evaluation_prompts: Prompts a domain; the same for all seeds.
    """

    def __init__(
        self,
        batch_size: int = 64,
        token_budget: int = TOKEN_BUDGET,
        prompts_per_round: int = 192,
        start_fuse_prompts: int = 192,
        fuse_prompts_per_round: int = 96,
        evaluation_prompts: int = 256,
    ) -> None:
        super().__init__(batch_size, token_budget)
        self.prompts_per_round = prompts_per_round
        self.start_fuse_prompts = start_fuse_prompts
        self.fuse_prompts_per_round = fuse_prompts_per_round
        self.evaluation_prompts = evaluation_prompts

    def train_prompts(self, round_index: int) -> list[Prompt]:
        """Return the prompts of a round's training pairs."""
        count = self.prompts_per_round
        return prompts.round_prompts(run_seed(), round_index, count, self.tokenizer)

    def fuse_prompts(self, round_index: int) -> list[Prompt]:
        """Return the held-out prompts answered after a round."""
        count = self.fuse_prompts_per_round if round_index else self.start_fuse_prompts
        return prompts.fuse_prompts(run_seed(), round_index, count, self.tokenizer)

    def eval_prompts(self) -> Mapping[str, list[Prompt]]:
        """Return the evaluation prompts in and out of domain."""
        count = self.evaluation_prompts
        return {d: prompts.eval_prompts(d, 0, count, self.tokenizer) for d in _DOMAINS}
