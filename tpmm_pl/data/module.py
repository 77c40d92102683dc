"""Data modules: a round's batches from disk, and where pairs and prompts come from."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_only
from torch.utils.data import DataLoader

from tpmm_pl.data.batching import epoch_loader, fuse_loader
from tpmm_pl.data.chat import tokenize_pairs, tokenize_prompts
from tpmm_pl.data.formats import RawPair, read_preferences, read_prompts
from tpmm_pl.data.pairs import read_fuse_pool, read_pairs
from tpmm_pl.data.splits import refuse_shared_prompts, shuffled_by_prompt, split_by_prompt
from tpmm_pl.rounds import RoundSchedule, run_seed
from tpmm_pl.trajectory import TrajectoryStore
from tpmm_pl.types import InputError, Pair, Prompt


class RunData(LightningDataModule):
    """Reads the pairs of the current round from the run folder.

    The tokenizer is the policy's. ``trainer.reload_dataloaders_every_n_epochs`` must be 1.

    Args:
        batch_size: Pairs an optimizer step and device.
    """

    def __init__(self, batch_size: int) -> None:
        super().__init__()
        if batch_size < 1:
            raise InputError(f"batch_size is {batch_size}; it must be at least 1")
        self.batch_size = batch_size
        self.tokenizer: Any = None

    def prepare_data(self) -> None:
        """Make or fetch the starting policy, in one process."""
        self._module.policy_source.prepare()

    def setup(self, stage: str) -> None:
        """Load the policy's tokenizer."""
        self.tokenizer = self._module.policy_source.load_tokenizer()

    def train_dataloader(self) -> DataLoader[Pair]:
        """Return the batches of the current round's pairs.

        Raises:
            InputError: If the round has no pairs on disk.
        """
        trainer = self._trainer
        epochs_per_round = getattr(self._module, "epochs_per_round", 1)
        index = RoundSchedule(epochs_per_round).round_of(trainer.current_epoch)
        store = TrajectoryStore(Path(trainer.default_root_dir) / "trajectory")
        pairs = store.record(index - 1).pairs
        if pairs is None:
            raise InputError(f"{store.root} has no pairs for round {index}; add a pairs callback")
        return epoch_loader(
            read_pairs(store.path(pairs)),
            trainer,
            batch_size=self.batch_size,
            pad_id=self.tokenizer.pad_token_id,
        )

    def eval_prompts(self) -> Mapping[str, list[Prompt]]:
        """Return no prompts: nothing is sampled in evaluation."""
        return {}

    def eval_pairs(self) -> Mapping[str, list[Pair]]:
        """Return no held-out pairs."""
        return {}

    @property
    def _trainer(self) -> Any:
        if self.trainer is None:
            raise RuntimeError(f"{type(self).__name__} is not attached to a Trainer")
        return self.trainer

    @property
    def _module(self) -> Any:
        return self._trainer.lightning_module


class PreferenceData(RunData):
    """Preference pairs from files, a part of them for every round.

    The fuse pairs are held out first, by prompt: no prompt of theirs is trained on.

    Args:
        train: JSONL (also ``.gz``) or JSON of pairs, plain or conversational.
        fuse: A file of fuse pairs; otherwise a part of ``train`` is held out.
        fuse_fraction: Share of the prompts of ``train`` held out, without ``fuse``.
        evaluation: Files of held-out pairs by domain (``in_domain``, ``out_of_domain``);
            otherwise a part of ``train`` is held out.
        eval_fraction: Share of the prompts of ``train`` held out, without ``evaluation``.
        batch_size: Pairs an optimizer step and device.
        pairs_per_round: Pairs of a round; by default all pairs over the rounds.
        max_length: Tokens of prompt and completion together; completions are cut at the end.
        max_prompt_length: Tokens of the prompt, whose beginning is cut; half of ``max_length``
            by default, so that room for completions is left.
        max_eval_pairs: At most so many pairs a domain.
    """

    def __init__(
        self,
        train: Path,
        fuse: Path | None = None,
        fuse_fraction: float = 0.1,
        evaluation: dict[str, Path] | None = None,
        eval_fraction: float = 0.05,
        batch_size: int = 8,
        pairs_per_round: int | None = None,
        max_length: int = 1024,
        max_prompt_length: int | None = None,
        max_eval_pairs: int = 512,
    ) -> None:
        super().__init__(batch_size)
        self.train = Path(train)
        self.fuse = fuse
        self.fuse_fraction = fuse_fraction
        self.evaluation = evaluation or {}
        self.eval_fraction = eval_fraction
        self.pairs_per_round = pairs_per_round
        self.max_length = max_length
        self.max_prompt_length = max_prompt_length
        self.max_eval_pairs = max_eval_pairs

    def setup(self, stage: str) -> None:
        """Read, split and tokenise the files; report what was dropped."""
        super().setup(stage)
        rows = self._read(self.train)
        evaluated = {domain: self._read(path) for domain, path in self.evaluation.items()}
        if not self.evaluation:
            rows, evaluated["in_domain"] = split_by_prompt(rows, self.eval_fraction, run_seed())
        if self.fuse is None:
            rows, held_out = split_by_prompt(rows, self.fuse_fraction, run_seed())
        else:
            held_out = self._read(self.fuse)
            refuse_shared_prompts(rows, held_out)
        for unseen in evaluated.values():
            refuse_shared_prompts([*rows, *held_out], unseen)
        self._train_pairs = self._tokenize(shuffled_by_prompt(rows, run_seed()))
        self._fuse_pairs = self._tokenize(held_out, self.fuse)
        self._eval_pairs = {
            domain: self._tokenize(unseen[: self.max_eval_pairs], self.evaluation.get(domain))
            for domain, unseen in evaluated.items()
        }
        available = min(self.pairs_per_round or len(self._train_pairs), len(self._train_pairs))
        if available < self.batch_size:
            raise InputError(
                f"{self.train} leaves {available} training pairs a round, fewer than a batch of "
                f"{self.batch_size}; give more pairs or a smaller data.batch_size"
            )

    def train_pairs(self, round_index: int) -> list[Pair]:
        """Return the part of a round; after the last part the first comes again."""
        rounds = getattr(self._module, "rounds", 1)
        count = self.pairs_per_round or max(self.batch_size, len(self._train_pairs) // rounds)
        start = (round_index - 1) * count
        total = len(self._train_pairs)
        return [self._train_pairs[(start + i) % total] for i in range(min(count, total))]

    def fuse_pairs(self) -> list[Pair]:
        """Return the held-out pairs that coefficients are learned on."""
        return self._fuse_pairs

    def eval_pairs(self) -> Mapping[str, list[Pair]]:
        """Return the held-out pairs by domain."""
        return self._eval_pairs

    def _read(self, path: Path) -> list[RawPair]:
        rows, dropped = read_preferences(Path(path))
        for reason, count in dropped.items():
            _say(f"{path}: {count} rows dropped: {reason}")
        return rows

    def _tokenize(self, rows: list[RawPair], path: Path | None = None) -> list[Pair]:
        pairs, changed = tokenize_pairs(
            rows,
            self.tokenizer,
            max_length=self.max_length,
            max_prompt_length=self.max_prompt_length or self.max_length // 2,
        )
        for reason, count in changed.items():
            _say(f"{path or self.train}: {count} of {len(rows)} pairs: {reason}")
        return pairs


class PromptData(RunData):
    """Prompts from files, a part of them for every round, for pairs made by the policy.

    Args:
        train: JSONL of prompts, plain or conversational.
        evaluation: Files of prompts by domain (``in_domain``, ``out_of_domain``); otherwise a
            part of ``train`` is held out.
        eval_fraction: Share of the prompts of ``train`` held out, without ``evaluation``.
        batch_size: Pairs an optimizer step and device.
        prompts_per_round: Prompts of a round; the file is gone through again when used up.
        fuse_prompts_per_round: Held-out prompts answered after a round.
        fuse_fraction: Share of the prompts held out for them.
        max_prompt_length: Tokens of a prompt; its beginning is cut.
        max_eval_prompts: At most so many prompts a domain.
    """

    def __init__(
        self,
        train: Path,
        evaluation: dict[str, Path] | None = None,
        eval_fraction: float = 0.05,
        batch_size: int = 8,
        prompts_per_round: int = 256,
        fuse_prompts_per_round: int = 64,
        fuse_fraction: float = 0.2,
        max_prompt_length: int = 512,
        max_eval_prompts: int = 256,
    ) -> None:
        super().__init__(batch_size)
        self.train = Path(train)
        self.evaluation = evaluation or {}
        self.eval_fraction = eval_fraction
        self.prompts_per_round = prompts_per_round
        self.fuse_prompts_per_round = fuse_prompts_per_round
        self.fuse_fraction = fuse_fraction
        self.max_prompt_length = max_prompt_length
        self.max_eval_prompts = max_eval_prompts

    def setup(self, stage: str) -> None:
        """Read, split and tokenise the prompts."""
        super().setup(stage)
        rows = read_prompts(self.train)
        evaluated = {d: read_prompts(Path(path)) for d, path in self.evaluation.items()}
        if not self.evaluation:
            rows, evaluated["in_domain"] = split_by_prompt(rows, self.eval_fraction, run_seed())
        for unseen in evaluated.values():
            refuse_shared_prompts(rows, unseen)
        rows, held_out = split_by_prompt(rows, self.fuse_fraction, run_seed())
        self._train_prompts = self._tokenize(shuffled_by_prompt(rows, run_seed()))
        self._fuse_prompts = self._tokenize(shuffled_by_prompt(held_out, run_seed()))
        self._eval_prompts = {
            domain: self._tokenize(unseen[: self.max_eval_prompts])
            for domain, unseen in evaluated.items()
        }

    def train_prompts(self, round_index: int) -> list[Prompt]:
        """Return the prompts of a round's training pairs."""
        return _part(self._train_prompts, round_index - 1, self.prompts_per_round)

    def fuse_prompts(self, round_index: int) -> list[Prompt]:
        """Return the held-out prompts answered after a round."""
        return _part(self._fuse_prompts, round_index, self.fuse_prompts_per_round)

    def eval_prompts(self) -> Mapping[str, list[Prompt]]:
        """Return the evaluation prompts by domain."""
        return self._eval_prompts

    def _tokenize(self, rows: list[Any]) -> list[Prompt]:
        return tokenize_prompts(rows, self.tokenizer, max_prompt_length=self.max_prompt_length)


class FusionData(RunData):
    """The held-out pairs of a finished run, for a fit of a ``FusionWeights`` of its own.

    Which run, the number of steps and the batch size are the module's.
    """

    def __init__(self) -> None:
        super().__init__(batch_size=1)

    def train_dataloader(self) -> DataLoader[Pair]:
        """Return the batches of the fit.

        Raises:
            InputError: If the run has no trajectory, or trained on its held-out pairs.
        """
        run, settings = Path(self._module.run), self._module.settings
        store = TrajectoryStore(run / "trajectory")
        if not store.rounds:
            raise InputError(f"{run} holds no trajectory; give the folder of a finished run")
        if store.trained_on_fuse_pairs:
            raise InputError(f"{run} trained on its held-out pairs; nothing can be learned on them")
        return fuse_loader(
            read_fuse_pool(store, store.rounds[-1].round),
            batch_size=settings.batch_size,
            steps=settings.steps,
            pad_id=self.tokenizer.pad_token_id,
            generator=torch.Generator().manual_seed(run_seed()),
        )


def _part(prompts: list[Prompt], part: int, count: int) -> list[Prompt]:
    total = len(prompts)
    return [prompts[(part * count + i) % total] for i in range(min(count, total))]


@rank_zero_only
def _say(sentence: str) -> None:
    print(sentence, flush=True)
