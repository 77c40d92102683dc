"""Preference pairs that a reward model is trained and evaluated on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from tpmm_pl.data.batching import epoch_loader, micro_batches
from tpmm_pl.data.cache import CACHE_DIR, Encoding
from tpmm_pl.data.notices import say
from tpmm_pl.data.packing import TOKEN_BUDGET
from tpmm_pl.data.parts import TableRounds, describe_parts, hold_out, refuse_leak, with_noise
from tpmm_pl.data.prepare import Data, Preparation, announce, refuse_below, refuse_setting
from tpmm_pl.data.rows.sources import as_sources
from tpmm_pl.data.table import PairTable, join
from tpmm_pl.data.tokens.example import describe_example
from tpmm_pl.noise import LabelNoise
from tpmm_pl.rounds import run_seed
from tpmm_pl.types import InputError, Pair


class RewardPairs(LightningDataModule):
    """Training pairs in an order of each epoch's own, and held-out pairs by domain.

    A ``setup`` fills ``train_pairs`` and ``eval_pairs``. The tokenizer is the reward model's.
    ``trainer.reload_dataloaders_every_n_epochs`` must be 1.

    Args:
        batch_size: Pairs an optimizer step and device.
        token_budget: Tokens that go through the model at once; a step of more is cut into
            micro-batches whose gradients add up.

    Raises:
        InputError: If a number is less than 1.
    """

    train_pairs: Sequence[Pair]
    eval_pairs: Mapping[str, Sequence[Pair]]

    def __init__(self, batch_size: int, token_budget: int = TOKEN_BUDGET) -> None:
        super().__init__()
        refuse_below(1, batch_size=batch_size, token_budget=token_budget)
        self.batch_size = batch_size
        self.token_budget = token_budget
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
            token_budget=self.token_budget,
        )

    def val_dataloader(self) -> list[DataLoader[Pair]]:
        """Return the held-out pairs in order, one loader a domain."""
        return evaluation_loaders(self.eval_pairs, token_budget=self.token_budget)

    @property
    def _trainer(self) -> Any:
        if self.trainer is None:
            raise RuntimeError(f"{type(self).__name__} is not attached to a Trainer")
        return self.trainer

    @property
    def _source(self) -> Any:
        return self._trainer.lightning_module.reward_source


class RewardData(RewardPairs):
    """Preference pairs from files or the hub, shuffled anew every epoch, and held-out ones.

    Args:
        train: A file (JSONL, JSON, CSV, Parquet; ``.jsonl.gz``), a folder that ``datasets`` saved,
            a data set on the hub, a :class:`~tpmm_pl.data.rows.sources.DataSource` of these with
            split and mapping, or a list of them; a row may have a ``margin``.
        evaluation: The same for held-out pairs by domain (``in_domain``, ``out_of_domain``);
            otherwise a part of ``train`` is held out.
        eval_fraction: Share of the prompts of ``train`` held out, without ``evaluation``.
        batch_size: Pairs an optimizer step and device.
        token_budget: Tokens that go through the model at once; a step of more is cut into
            micro-batches whose gradients add up.
        max_length: Tokens of prompt and completion together; completions are cut at the end.
        max_prompt_length: Tokens of the prompt; half of ``max_length`` by default, so that room
            for completions is left.
        truncation: Which part of a prompt over its budget stays: ``keep_end`` or ``keep_start``.
        max_eval_pairs: At most so many pairs a domain.
        max_bad_rows: How many rows that cannot be read may be skipped, counted.
        noise: How the labels of training pairs err; evaluation pairs stay as they are.
        cache_dir: Where tokenised pairs are kept, one folder a fingerprint; delete it to clear.
    """

    def __init__(
        self,
        train: Data,
        evaluation: dict[str, Data] | None = None,
        eval_fraction: float = 0.05,
        batch_size: int = 8,
        token_budget: int = TOKEN_BUDGET,
        max_length: int = 1024,
        max_prompt_length: int | None = None,
        truncation: str = "keep_end",
        max_eval_pairs: int = 512,
        max_bad_rows: int = 0,
        noise: LabelNoise | None = None,
        cache_dir: Path = CACHE_DIR,
    ) -> None:
        super().__init__(batch_size, token_budget)
        refuse_below(0, max_eval_pairs=max_eval_pairs)
        self.train = as_sources(train)
        self.evaluation = {d: as_sources(data) for d, data in (evaluation or {}).items()}
        self.eval_fraction = eval_fraction
        self.encoding = Encoding.of(max_length, max_prompt_length, truncation, whole_turns=True)
        self.max_eval_pairs = max_eval_pairs
        self.max_bad_rows = max_bad_rows
        self.noise = noise
        self.cache_dir = cache_dir

    def setup(self, stage: str) -> None:
        """Prepare and split the pairs; say what became of the rows.

        Raises:
            InputError: If a source is at fault, a prompt is on both sides, or too few pairs are
                left.
        """
        if stage != "fit" and self.tokenizer is not None:
            return  # a validation behind the fit: its pairs are at hand, and were told
        super().setup(stage)
        refuse_setting(self.train, "weight", "the pairs of all sources are shuffled as one")
        prepare = Preparation(
            self.tokenizer, self.encoding, max_bad_rows=self.max_bad_rows, cache_dir=self.cache_dir
        )
        evaluated = {d: prepare.held_out(data) for d, data in self.evaluation.items()}
        train = prepare.tables(self.train)
        announce(prepare.report, Path(self._trainer.default_root_dir))
        if not evaluated and self.eval_fraction:
            train, evaluated["in_domain"] = hold_out(train, self.eval_fraction, run_seed())
        for unseen in evaluated.values():
            refuse_leak(train, unseen)
        pairs = with_noise(join(*train), self.noise, f"{run_seed()}/train")
        if len(pairs) < self.batch_size:
            label = ", ".join(source.label for source in self.train)
            raise InputError(
                f"{label} leaves {len(pairs)} training pairs, fewer than a batch"
                f" of {self.batch_size}; give more pairs or a smaller data.batch_size"
            )
        self.train_pairs = pairs
        held_out = {d: unseen[: self.max_eval_pairs] for d, unseen in evaluated.items()}
        self.eval_pairs = held_out
        say(describe_parts(TableRounds(pairs).describe(), None, held_out))
        say(describe_example(pairs[0], self.tokenizer))


def evaluation_loaders(
    pairs: Mapping[str, Sequence[Pair]], *, token_budget: int = TOKEN_BUDGET, batch_size: int = 32
) -> list[DataLoader[Pair]]:
    """Return one loader a domain, its pairs in their order, the last batch smaller.

    Args:
        pairs: By domain.
        token_budget: Tokens of a micro-batch.
        batch_size: Pairs a batch.
    """
    return [
        DataLoader(
            of_domain,  # type: ignore[arg-type]  # a sequence is a map-style dataset
            batch_size=batch_size,
            collate_fn=partial(micro_batches, token_budget=token_budget),
        )
        for of_domain in pairs.values()
    ]


def read_reward_pairs(
    path: Path,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    max_prompt_length: int | None = None,
) -> PairTable:
    """Read and tokenise pairs; say what became of the rows.

    Args:
        path: A file, a folder or a data set, as ``train`` of :class:`RewardData`.
        tokenizer: The reward model's.
        max_length: Tokens of prompt and completion together; completions are cut at the end.
        max_prompt_length: Tokens of the prompt, whose beginning is cut; half of ``max_length``
            by default.

    Raises:
        InputError: If the file is at fault.
    """
    encoding = Encoding.of(max_length, max_prompt_length, whole_turns=True)
    prepare = Preparation(tokenizer, encoding)
    pairs = join(*prepare.tables(as_sources(path)))
    say(prepare.report.table())
    return pairs
