"""Preference pairs that a reward model is trained and evaluated on."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_only
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from tpmm_pl.data.batching import collate, epoch_loader
from tpmm_pl.data.chat import tokenize_pairs
from tpmm_pl.data.formats import RawPair, read_preferences
from tpmm_pl.data.splits import refuse_shared_prompts, split_by_prompt
from tpmm_pl.rounds import run_seed
from tpmm_pl.types import InputError, Pair


class RewardPairs(LightningDataModule):
    """Training pairs in an order of each epoch's own, and held-out pairs by domain.

    A ``setup`` fills ``train_pairs`` and ``eval_pairs``. The tokenizer is the reward model's.
    ``trainer.reload_dataloaders_every_n_epochs`` must be 1.

    Args:
        batch_size: Pairs an optimizer step and device.

    Raises:
        InputError: If ``batch_size`` is less than 1.
    """

    train_pairs: Sequence[Pair]
    eval_pairs: Mapping[str, Sequence[Pair]]

    def __init__(self, batch_size: int) -> None:
        super().__init__()
        if batch_size < 1:
            raise InputError(f"batch_size is {batch_size}; it must be at least 1")
        self.batch_size = batch_size
        self.tokenizer: Any = None

    @property
    def domains(self) -> list[str]:
        """Return the names of the domains in the order of the validation loaders."""
        return list(self.eval_pairs)

    def prepare_data(self) -> None:
        """Make or fetch the model, in one process."""
        self._source.prepare()

    def setup(self, stage: str) -> None:
        """Load the reward model's tokenizer."""
        self.tokenizer = self._source.load_tokenizer()

    def train_dataloader(self) -> DataLoader[Pair]:
        """Return the batches of the current epoch."""
        return epoch_loader(
            self.train_pairs,
            self._trainer,
            batch_size=self.batch_size,
            pad_id=self.tokenizer.pad_token_id,
        )

    def val_dataloader(self) -> list[DataLoader[Pair]]:
        """Return the held-out pairs in order, one loader a domain."""
        return evaluation_loaders(self.eval_pairs, pad_id=self.tokenizer.pad_token_id)

    @property
    def _trainer(self) -> Any:
        if self.trainer is None:
            raise RuntimeError(f"{type(self).__name__} is not attached to a Trainer")
        return self.trainer

    @property
    def _source(self) -> Any:
        return self._trainer.lightning_module.reward_source


class RewardData(RewardPairs):
    """Preference pairs from files, shuffled anew every epoch, and held-out ones by domain.

    Args:
        train: JSONL (also ``.gz``) or JSON of pairs, plain or conversational; a row may have a
            ``margin``.
        evaluation: Files of held-out pairs by domain (``in_domain``, ``out_of_domain``);
            otherwise a part of ``train`` is held out.
        eval_fraction: Share of the prompts of ``train`` held out, without ``evaluation``.
        batch_size: Pairs an optimizer step and device.
        max_length: Tokens of prompt and completion together; completions are cut at the end.
        max_prompt_length: Tokens of the prompt, whose beginning is cut; half of ``max_length``
            by default, so that room for completions is left.
        max_eval_pairs: At most so many pairs a domain.
    """

    def __init__(
        self,
        train: Path,
        evaluation: dict[str, Path] | None = None,
        eval_fraction: float = 0.05,
        batch_size: int = 8,
        max_length: int = 1024,
        max_prompt_length: int | None = None,
        max_eval_pairs: int = 512,
    ) -> None:
        super().__init__(batch_size)
        self.train = Path(train)
        self.evaluation = evaluation or {}
        self.eval_fraction = eval_fraction
        self.max_length = max_length
        self.max_prompt_length = max_prompt_length
        self.max_eval_pairs = max_eval_pairs

    def setup(self, stage: str) -> None:
        """Read, split and tokenise the files; report what was dropped.

        Raises:
            InputError: If a file is at fault, a prompt is on both sides, or too few pairs are left.
        """
        super().setup(stage)
        rows = _read(self.train)
        evaluated = {domain: _read(Path(path)) for domain, path in self.evaluation.items()}
        if not self.evaluation:
            rows, held_out = split_by_prompt(rows, self.eval_fraction, run_seed())
            evaluated = {"in_domain": held_out} if held_out else {}
        for unseen in evaluated.values():
            refuse_shared_prompts(rows, unseen)
        self.train_pairs = self._tokenize(rows, self.train)
        self.eval_pairs = {
            domain: self._tokenize(
                unseen[: self.max_eval_pairs], self.evaluation.get(domain, self.train)
            )
            for domain, unseen in evaluated.items()
        }
        for domain, pairs in self.eval_pairs.items():
            if not pairs:
                path = self.evaluation.get(domain, self.train)
                raise InputError(f"{path} leaves no pair to evaluate on ({domain}); give others")
        if len(self.train_pairs) < self.batch_size:
            raise InputError(
                f"{self.train} leaves {len(self.train_pairs)} training pairs, fewer than a batch"
                f" of {self.batch_size}; give more pairs or a smaller data.batch_size"
            )

    def _tokenize(self, rows: list[RawPair], path: Path) -> list[Pair]:
        return _tokenize(rows, path, self.tokenizer, self.max_length, self.max_prompt_length)


def evaluation_loaders(
    pairs: Mapping[str, Sequence[Pair]], *, pad_id: int, batch_size: int = 32
) -> list[DataLoader[Pair]]:
    """Return one loader a domain, its pairs in their order, the last batch smaller.

    Args:
        pairs: By domain.
        pad_id: Token id written on padding.
        batch_size: Pairs a batch.
    """
    return [
        DataLoader(
            of_domain,  # type: ignore[arg-type]  # a sequence is a map-style dataset
            batch_size=batch_size,
            collate_fn=partial(collate, pad_id=pad_id),
        )
        for of_domain in pairs.values()
    ]


def read_reward_pairs(
    path: Path,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    max_prompt_length: int | None = None,
) -> list[Pair]:
    """Read and tokenise a file of pairs; say what was cut off or dropped.

    Args:
        path: JSONL (also ``.gz``) or JSON of pairs, plain or conversational.
        tokenizer: The reward model's.
        max_length: Tokens of prompt and completion together; completions are cut at the end.
        max_prompt_length: Tokens of the prompt, whose beginning is cut; half of ``max_length``
            by default.

    Raises:
        InputError: If the file is at fault.
    """
    return _tokenize(_read(path), path, tokenizer, max_length, max_prompt_length)


def _read(path: Path) -> list[RawPair]:
    rows, dropped = read_preferences(path)
    for reason, count in dropped.items():
        _say(f"{path}: {count} rows dropped: {reason}")
    return rows


def _tokenize(
    rows: list[RawPair],
    path: Path,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    max_prompt_length: int | None,
) -> list[Pair]:
    pairs, changed = tokenize_pairs(
        rows,
        tokenizer,
        max_length=max_length,
        whole_turns=True,
        max_prompt_length=max_prompt_length or max_length // 2,
    )
    for reason, count in changed.items():
        _say(f"{path}: {count} of {len(rows)} pairs: {reason}")
    return pairs


@rank_zero_only
def _say(sentence: str) -> None:
    # not on stdout: a command may print one JSON object there and nothing else
    print(sentence, file=sys.stderr, flush=True)
