"""Training steps of TRL's own trainers on pairs of token ids.

Rows, loss, metrics, optimizer and collation are TRL's; what its ``train()`` does besides (logging,
schedule, clipping, saving) is left out, which is in its favour.
"""

from __future__ import annotations

import os
import tempfile
import time
import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import transformers
from datasets import Dataset, disable_progress_bars
from peft import LoraConfig
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedModel, PreTrainedTokenizerFast
from transformers.trainer_pt_utils import LengthGroupedSampler
from trl.trainer.dpo_config import DPOConfig
from trl.trainer.dpo_trainer import DPOTrainer
from trl.trainer.reward_config import RewardConfig
from trl.trainer.reward_trainer import RewardTrainer

from tpmm_pl.types import Pair

RATE = 1e-6
SETTINGS = {
    "learning_rate": RATE,
    "gradient_checkpointing": False,
    "bf16": False,
    "use_cpu": True,
    "report_to": [],
    "disable_tqdm": True,
    "remove_unused_columns": False,
    "length_column_name": "length",
}


@dataclass(frozen=True)
class Variant:
    """Of TRL's DPO."""

    title: str
    compact: bool = False
    """Its head at completion positions only, as on GPUs; on a CPU it scores every position."""
    precomputed: bool = False
    """The reference's log-probabilities computed before the training."""
    grouped: bool = False
    """Its batches are of similar length."""
    checkpointing: bool = False
    lora: bool = False

    def head(self) -> AbstractContextManager[Any]:
        """Return a context in which TRL's head scores the positions it would on this device.

        The path is TRL's own: what is replaced is its question whether the device is a GPU.
        """
        if not self.compact:
            return nullcontext()
        return mock.patch("trl.trainer.utils._use_triton", return_value=True)


class _OfTokens(DPOTrainer):
    """Takes rows of token ids as they are, and counts what its reference pass costs."""

    reference_seconds = 0.0

    def _prepare_dataset(self, dataset: Dataset, *_: Any) -> Dataset:
        return dataset

    def compute_ref_log_probs(self, model: Any, inputs: Any) -> Any:
        started = time.process_time()
        logps = super().compute_ref_log_probs(model, inputs)
        self.reference_seconds += time.process_time() - started
        return logps


class TrlStep:
    """Forward, backward, optimizer and ``zero_grad`` of a trainer of TRL.

    Args:
        trainer: Its model and its data.
        variant: Where its head looks.
        size: Pairs a batch.
        seed: Of its sampler.
    """

    def __init__(self, trainer: Any, variant: Variant, size: int, seed: int = 0) -> None:
        self.trainer, self.variant = trainer, variant
        trainer.create_optimizer()
        trainer.current_gradient_accumulation_steps = 1  # as within train()
        if variant.checkpointing:
            trainer.model.gradient_checkpointing_enable()
        torch.manual_seed(seed)
        order = list(trainer._get_train_sampler())
        self.order = [order[start : start + size] for start in range(0, len(order), size)]
        """Which pairs each batch holds."""
        rows = trainer.train_dataset
        self._batches = [trainer.data_collator([rows[i] for i in part]) for part in self.order]

    @property
    def padded(self) -> list[int]:
        """Tokens of its batches, padding included."""
        return [batch["input_ids"].numel() for batch in self._batches]

    def __call__(self, number: int) -> float:
        """Take a step on a batch; return its loss."""
        trainer = self.trainer
        with self.variant.head():
            # a copy: the trainer adds to the batch
            loss = trainer.training_step(trainer.model, dict(self._batches[number]))
        trainer.optimizer.step()
        trainer.model.zero_grad()
        return float(loss)


def dpo_step(
    variant: Variant,
    policy: PreTrainedModel,
    reference: PreTrainedModel | None,
    pairs: Sequence[Pair],
    *,
    size: int,
    pad_id: int,
    beta: float,
) -> TrlStep:
    """Build the step of ``DPOTrainer``; a precomputed reference is computed here.

    Args:
        variant: Of TRL's settings.
        policy: The model to train.
        reference: The frozen model; ``None`` where the policy's start is the reference.
        pairs: All pairs.
        size: Pairs a batch.
        pad_id: A token that no pair holds.
        beta: Strength of the pull towards the reference.
    """
    settings = DPOConfig(
        output_dir=tempfile.gettempdir(),
        beta=beta,
        max_length=None,
        precompute_ref_log_probs=variant.precomputed,
        per_device_train_batch_size=size,
        train_sampling_strategy="group_by_length" if variant.grouped else "sequential",
        **SETTINGS | {"gradient_checkpointing": variant.checkpointing},
    )
    with variant.head():
        trainer = _OfTokens(
            policy,
            ref_model=reference,
            args=settings,
            processing_class=_tokenizer(pad_id),
            train_dataset=_dpo_rows(pairs),
            peft_config=_lora() if variant.lora else None,
        )
    return TrlStep(trainer, variant, size)


def reward_step(
    model: PreTrainedModel, pairs: Sequence[Pair], *, size: int, pad_id: int
) -> TrlStep:
    """Build the step of ``RewardTrainer``.

    Args:
        model: For sequence classification with one output.
        pairs: All pairs.
        size: Pairs a batch.
        pad_id: A token that no pair holds.
    """
    settings = RewardConfig(
        output_dir=tempfile.gettempdir(),
        max_length=None,
        per_device_train_batch_size=size,
        train_sampling_strategy="sequential",
        **SETTINGS,
    )
    trainer = RewardTrainer(
        model, args=settings, processing_class=_tokenizer(pad_id), train_dataset=_reward_rows(pairs)
    )
    return TrlStep(trainer, Variant("RewardTrainer"), size)


def grouped_by_length(pairs: Sequence[Pair], size: int) -> list[list[Pair]]:
    """Return the batches that its sampler makes of pairs, for counting their tokens."""
    lengths = [_longer(pair) for pair in pairs]
    generator = torch.Generator().manual_seed(0)
    order = list(LengthGroupedSampler(size, lengths=lengths, generator=generator))
    return [[pairs[i] for i in order[at : at + size]] for at in range(0, len(order), size)]


def quiet() -> None:
    """Leave out progress bars and advice, which are not what is measured."""
    disable_progress_bars()
    os.environ["TQDM_DISABLE"] = "1"  # the reference pass asks for it
    warnings.simplefilter("ignore", FutureWarning)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def _dpo_rows(pairs: Sequence[Pair]) -> Dataset:
    rows = [
        {
            "prompt_ids": list(pair.prompt_ids),
            "chosen_ids": list(pair.chosen_ids),
            "rejected_ids": list(pair.rejected_ids),
            "length": _longer(pair),
        }
        for pair in pairs
    ]
    return Dataset.from_list(rows)


def _reward_rows(pairs: Sequence[Pair]) -> Dataset:
    rows = [
        {
            "chosen_ids": [*pair.prompt_ids, *pair.chosen_ids],
            "rejected_ids": [*pair.prompt_ids, *pair.rejected_ids],
        }
        for pair in pairs
    ]
    return Dataset.from_list(rows)


def _longer(pair: Pair) -> int:
    return len(pair.prompt_ids) + max(len(pair.chosen_ids), len(pair.rejected_ids))


def _tokenizer(pad_id: int) -> PreTrainedTokenizerFast:
    # rows are tokenised: only the padding is asked for
    tokenizer = Tokenizer(WordLevel({"<pad>": pad_id}, unk_token="<pad>"))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<pad>", padding_side="right"
    )


def _lora() -> LoraConfig:
    return LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
