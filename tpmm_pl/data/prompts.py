"""The data module of prompts that the policy itself answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from itertools import chain

from tpmm_pl.data.module import RunData
from tpmm_pl.data.packing import TOKEN_BUDGET
from tpmm_pl.data.prepare import Data, announce, refuse_setting, sound_parts
from tpmm_pl.data.rows.formats import prompts
from tpmm_pl.data.rows.report import DataReport
from tpmm_pl.data.rows.sources import DataSource, as_sources
from tpmm_pl.data.splits import refuse_shared_prompts, shuffled_by_prompt, split_by_prompt
from tpmm_pl.data.tokens.chat import tokenize_prompts
from tpmm_pl.rounds import run_seed
from tpmm_pl.types import Prompt


class PromptData(RunData):
    """Prompts from files or the hub, a part of them for every round, for pairs of the policy's own.

    A prompt that comes several times is answered once.

    Args:
        train: A file of prompts, plain or conversational, a folder, a data set on the hub, a
            :class:`~tpmm_pl.data.rows.sources.DataSource` of these, or a list of them.
        evaluation: The same by domain (``in_domain``, ``out_of_domain``); otherwise a part of
            ``train`` is held out.
        eval_fraction: Share of the prompts of ``train`` held out, without ``evaluation``.
        batch_size: Pairs an optimizer step and device.
        token_budget: Tokens that go through the model at once; a step of more is cut into
            micro-batches whose gradients add up.
        prompts_per_round: Prompts of a round; all are gone through again when used up.
        fuse_prompts_per_round: Held-out prompts answered after a round.
        fuse_fraction: Share of the prompts held out for them.
        max_prompt_length: Tokens of a prompt.
        truncation: Which part of a longer prompt stays: ``keep_end`` or ``keep_start``.
        max_eval_prompts: At most so many prompts a domain.
        max_bad_rows: How many rows that cannot be read may be skipped, counted.
    """

    def __init__(
        self,
        train: Data,
        evaluation: dict[str, Data] | None = None,
        eval_fraction: float = 0.05,
        batch_size: int = 8,
        token_budget: int = TOKEN_BUDGET,
        prompts_per_round: int = 256,
        fuse_prompts_per_round: int = 64,
        fuse_fraction: float = 0.2,
        max_prompt_length: int = 512,
        truncation: str = "keep_end",
        max_eval_prompts: int = 256,
        max_bad_rows: int = 0,
    ) -> None:
        super().__init__(batch_size, token_budget)
        self.train = as_sources(train)
        self.evaluation = {d: as_sources(data) for d, data in (evaluation or {}).items()}
        self.eval_fraction = eval_fraction
        self.prompts_per_round = prompts_per_round
        self.fuse_prompts_per_round = fuse_prompts_per_round
        self.fuse_fraction = fuse_fraction
        self.max_prompt_length = max_prompt_length
        self.truncation = truncation
        self.max_eval_prompts = max_eval_prompts
        self.max_bad_rows = max_bad_rows

    def setup(self, stage: str) -> None:
        """Read, tokenise and split the prompts; say what became of the rows.

        Raises:
            InputError: If a source is at fault, or a prompt is on both sides.
        """
        super().setup(stage)
        report, seed = DataReport(self.max_bad_rows), run_seed()
        known = self._tokenized(self.train, report)
        evaluated = {d: self._tokenized(data, report) for d, data in self.evaluation.items()}
        announce(report, self._root)
        if not self.evaluation:
            known, evaluated["in_domain"] = _split(known, self.eval_fraction)
        for unseen in evaluated.values():
            texts = [prompt.text for prompt in unseen]
            refuse_shared_prompts(_names(known), _names(unseen), texts.__getitem__)
        known, held_out = _split(known, self.fuse_fraction)
        self._train_prompts = [known[row] for row in shuffled_by_prompt(_names(known), seed)]
        self._fuse_prompts = [held_out[row] for row in shuffled_by_prompt(_names(held_out), seed)]
        self._eval_prompts = {d: unseen[: self.max_eval_prompts] for d, unseen in evaluated.items()}

    def train_prompts(self, round_index: int) -> list[Prompt]:
        """Return the prompts of a round's training pairs."""
        return _part(self._train_prompts, round_index - 1, self.prompts_per_round)

    def fuse_prompts(self, round_index: int) -> list[Prompt]:
        """Return the held-out prompts answered after a round."""
        return _part(self._fuse_prompts, round_index, self.fuse_prompts_per_round)

    def eval_prompts(self) -> Mapping[str, list[Prompt]]:
        """Return the evaluation prompts by domain."""
        return self._eval_prompts

    def _tokenized(self, sources: Sequence[DataSource], report: DataReport) -> list[Prompt]:
        refuse_setting(sources, "streaming", "prompts are all read before the first round")
        refuse_setting(sources, "weight", "the prompts of all sources are shuffled as one")
        tokenize = partial(
            tokenize_prompts,
            tokenizer=self.tokenizer,
            max_prompt_length=self.max_prompt_length,
            truncation=self.truncation,
        )
        distinct: dict[str, Prompt] = {}
        for source in sources:
            refuse = partial(report.bad, source=source.label)
            parts = sound_parts(list(prompts(source, report)), tokenize, refuse)
            found, before = list(chain.from_iterable(parts)), len(distinct)
            for prompt in found:
                distinct.setdefault(prompt.prompt_id, prompt)
            if again := before + len(found) - len(distinct):
                report.drop(source.label, "the same prompt again", again)
        return list(distinct.values())


def _split(known: list[Prompt], fraction: float) -> tuple[list[Prompt], list[Prompt]]:
    kept, held_out = split_by_prompt(_names(known), fraction, run_seed())
    return [known[row] for row in kept], [known[row] for row in held_out]


def _names(known: Sequence[Prompt]) -> list[str]:
    return [prompt.prompt_id for prompt in known]


def _part(known: list[Prompt], part: int, count: int) -> list[Prompt]:
    total = len(known)
    return [known[(part * count + i) % total] for i in range(min(count, total))]
