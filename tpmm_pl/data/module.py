"""Data modules: a round's batches from disk, and where its pairs come from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader

from tpmm_pl.data.batching import epoch_loader, fuse_loader
from tpmm_pl.data.cache import CACHE_DIR, Encoding
from tpmm_pl.data.notices import say
from tpmm_pl.data.packing import TOKEN_BUDGET
from tpmm_pl.data.pairs import read_fuse_pool, read_pairs
from tpmm_pl.data.parts import Parts, TableRounds, describe_parts, ordered, split_parts, with_noise
from tpmm_pl.data.prepare import Data, Preparation, announce, refuse_below, write_report
from tpmm_pl.data.rows.sources import as_sources
from tpmm_pl.data.streams import PairStream
from tpmm_pl.data.table import PairTable
from tpmm_pl.data.tokens.example import describe_example
from tpmm_pl.noise import LabelNoise
from tpmm_pl.rounds import RoundSchedule, run_seed
from tpmm_pl.trajectory import TrajectoryStore
from tpmm_pl.types import InputError, Pair, Prompt


class RunData(LightningDataModule):
    """Reads the pairs of the current round from the run folder.

    The tokenizer is the policy's. ``trainer.reload_dataloaders_every_n_epochs`` must be 1.

    Args:
        batch_size: Pairs an optimizer step and device.
        token_budget: Tokens that go through the model at once; a step of more is cut into
            micro-batches whose gradients add up.
    """

    def __init__(self, batch_size: int, token_budget: int = TOKEN_BUDGET) -> None:
        super().__init__()
        refuse_below(1, batch_size=batch_size, token_budget=token_budget)
        self.batch_size = batch_size
        self.token_budget = token_budget
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
        store = TrajectoryStore(self._root / "trajectory")
        pairs = store.record(index - 1).pairs
        if pairs is None:
            raise InputError(f"{store.root} has no pairs for round {index}; add a pairs callback")
        return epoch_loader(
            read_pairs(store.path(pairs)),
            trainer,
            batch_size=self.batch_size,
            token_budget=self.token_budget,
        )

    def eval_prompts(self) -> Mapping[str, list[Prompt]]:
        """Return no prompts: nothing is sampled in evaluation."""
        return {}

    def eval_pairs(self) -> Mapping[str, Sequence[Pair]]:
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

    @property
    def _root(self) -> Path:
        return Path(self._trainer.default_root_dir)


class PreferenceData(RunData):
    """Preference pairs from files or the hub, a part of them for every round.

    The fuse pairs are held out first, by prompt: no prompt of theirs is trained on. Pairs are
    tokenised once and kept in ``cache_dir``. The distinct prompts of a round's pairs and of the
    fuse pairs can be answered by the policy, so that its own pairs are mixed with these.

    Args:
        train: A file (JSONL, JSON, CSV, Parquet; ``.jsonl.gz``), a folder that ``datasets`` saved,
            a data set on the hub, a :class:`~tpmm_pl.data.rows.sources.DataSource` of these with
            split, mapping and weight, or a list of them.
        fuse: The same for fuse pairs; otherwise a part of ``train`` is held out.
        fuse_fraction: Share of the prompts of ``train`` held out, without ``fuse``.
        evaluation: The same for held-out pairs by domain (``in_domain``, ``out_of_domain``);
            otherwise a part of ``train`` is held out.
        eval_fraction: Share of the prompts of ``train`` held out, without ``evaluation``.
        batch_size: Pairs an optimizer step and device.
        token_budget: Tokens that go through the model at once; a step of more is cut into
            micro-batches whose gradients add up.
        pairs_per_round: Pairs of a round, or ``all`` for all of them every round; by default all
            pairs over the rounds. A streaming source needs a number.
        max_length: Tokens of prompt and completion together; completions are cut at the end.
        max_prompt_length: Tokens of the prompt; half of ``max_length`` by default, so that room
            for completions is left.
        truncation: Which part of a prompt over its budget stays: ``keep_end`` or ``keep_start``.
        max_eval_pairs: At most so many pairs a domain, 0 for none; of a stream, also of fuse pairs.
        max_bad_rows: How many rows that cannot be read may be skipped, counted.
        noise: How the labels of training and fuse pairs err; evaluation pairs stay as they are.
        cache_dir: Where tokenised pairs are kept, one folder a fingerprint; delete it to clear.
    """

    _rounds: TableRounds | PairStream

    def __init__(
        self,
        train: Data,
        fuse: Data | None = None,
        fuse_fraction: float = 0.1,
        evaluation: dict[str, Data] | None = None,
        eval_fraction: float = 0.05,
        batch_size: int = 8,
        token_budget: int = TOKEN_BUDGET,
        pairs_per_round: int | Literal["all"] | None = None,
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
        if isinstance(pairs_per_round, int):
            refuse_below(1, pairs_per_round=pairs_per_round)
        self.train = as_sources(train)
        self.fuse = None if fuse is None else as_sources(fuse)
        self.fuse_fraction = fuse_fraction
        self.evaluation = {d: as_sources(data) for d, data in (evaluation or {}).items()}
        self.eval_fraction = eval_fraction
        self.pairs_per_round = pairs_per_round
        self.encoding = Encoding.of(max_length, max_prompt_length, truncation)
        self.max_eval_pairs = max_eval_pairs
        self.max_bad_rows = max_bad_rows
        self.noise = noise
        self.cache_dir = cache_dir
        self.label = ", ".join(source.label for source in self.train)

    def setup(self, stage: str) -> None:
        """Prepare and split the pairs; say what became of the rows.

        Raises:
            InputError: If a source is at fault, a prompt is on both sides, or too few pairs are
                left.
        """
        super().setup(stage)
        self._prepare = Preparation(
            self.tokenizer, self.encoding, max_bad_rows=self.max_bad_rows, cache_dir=self.cache_dir
        )
        self._report = self._prepare.report
        held_out = self._prepare.held_out
        fuse = None if self.fuse is None else held_out(self.fuse)
        evaluation = {domain: held_out(data) for domain, data in self.evaluation.items()}
        streaming = any(source.streaming for source in self.train)
        parts = (self._stream if streaming else self._split)(fuse, evaluation)
        self._fuse_pairs = with_noise(parts.fuse, self.noise, f"{run_seed()}/fuse")
        self._eval_pairs = {d: p[: self.max_eval_pairs] for d, p in parts.evaluation.items()}
        say(describe_parts(self._rounds.describe(), self._fuse_pairs, self._eval_pairs))
        say(describe_example(self._rounds.part(1)[0], self.tokenizer))

    def train_pairs(self, round_index: int) -> PairTable:
        """Return the part of a round; after the last part the first comes again."""
        pairs = self._rounds.part(round_index)
        write_report(self._report, self._root)  # of a stream, rows have come to it
        return pairs

    def fuse_pairs(self) -> PairTable:
        """Return the held-out pairs that coefficients are learned on."""
        return self._fuse_pairs

    def train_prompts(self, round_index: int) -> list[Prompt]:
        """Return the distinct prompts of a round's pairs."""
        return self.train_pairs(round_index).prompts()

    def fuse_prompts(self, round_index: int) -> list[Prompt]:
        """Return the distinct prompts of the fuse pairs, the same after every round."""
        return self._fuse_pairs.prompts()

    def eval_pairs(self) -> Mapping[str, PairTable]:
        """Return the held-out pairs by domain."""
        return self._eval_pairs

    def _split(self, fuse: PairTable | None, evaluation: dict[str, PairTable]) -> Parts:
        tables = self._prepare.tables(self.train)
        announce(self._report, self._root)
        parts = split_parts(
            tables,
            fuse,
            evaluation,
            fuse_fraction=self.fuse_fraction,
            eval_fraction=self.eval_fraction,
            seed=run_seed(),
        )
        pairs = ordered(parts.train, [source.weight for source in self.train], run_seed())
        noisy = with_noise(pairs, self.noise, f"{run_seed()}/train")
        self._rounds = TableRounds(noisy, self._count(len(noisy)))
        return parts

    def _count(self, available: int) -> int:
        rounds = getattr(self._module, "rounds", 1)
        shard = available if self.pairs_per_round == "all" else self.pairs_per_round
        count = max(self.batch_size, available // rounds) if shard is None else shard
        self._refuse_too_few(min(count, available))
        if count > available:
            say(
                f"data.pairs_per_round is {count}, but there are {available} training pairs;"
                " every round trains on all of them"
            )
        return count

    def _refuse_too_few(self, count: int) -> None:
        if count < self.batch_size:
            raise InputError(
                f"{self.label} leaves {count} training pairs a round, fewer than a batch of"
                f" {self.batch_size}; give more pairs or a smaller data.batch_size"
            )

    def _stream(self, fuse: PairTable | None, evaluation: dict[str, PairTable]) -> Parts:
        if not isinstance(self.pairs_per_round, int):
            raise InputError(
                f"{self.label} is streaming and data.pairs_per_round is {self.pairs_per_round};"
                " give a number, the budget of a round"
            )
        self._refuse_too_few(self.pairs_per_round)
        make = partial(
            PairStream,
            pairs_per_round=self.pairs_per_round,
            fuse=fuse,
            evaluation=evaluation,
            fuse_fraction=self.fuse_fraction,
            eval_fraction=self.eval_fraction,
            seed=run_seed(),
            label=self.label,
        )
        rounds = getattr(self._module, "rounds", 1)
        parts = make(partial(self._read, None)).held_out(rounds=rounds, limit=self.max_eval_pairs)
        self._rounds = make(partial(self._read, self.noise))
        self._rounds.part(1)  # what is told is what the first round has read
        announce(self._report, self._root)
        return parts

    def _read(self, noise: LabelNoise | None) -> Iterator[PairTable]:
        # a pass over the stream has a report of its own
        self._report = deepcopy(self._prepare.report)
        chunks = self._prepare.stream(self.train, self._report, run_seed())
        for number, chunk in enumerate(chunks):
            yield with_noise(chunk, noise, f"{run_seed()}/train/{number}")


class FusionData(RunData):
    """The held-out pairs of a finished run, for a fit of a ``FusionWeights`` of its own.

    Which run, the number of steps and the batch size are the module's.

    Args:
        token_budget: Tokens that go through the model at once; a step of more is cut into
            micro-batches whose gradients add up.
    """

    def __init__(self, token_budget: int = TOKEN_BUDGET) -> None:
        super().__init__(batch_size=1, token_budget=token_budget)

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
            token_budget=self.token_budget,
            generator=torch.Generator().manual_seed(run_seed()),
        )
