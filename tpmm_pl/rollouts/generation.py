"""Who samples the policy's completions: this process, or an engine that is given its weights."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from copy import deepcopy
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, Protocol

from peft import PeftModel
from torch import nn
from transformers import PreTrainedTokenizerBase

from tpmm_pl import processes
from tpmm_pl.models.export import export_model
from tpmm_pl.models.sharding import is_sharded
from tpmm_pl.models.weights import whole_state
from tpmm_pl.rollouts.sampling import sample_completions
from tpmm_pl.types import Completion, InputError, Prompt


@dataclass(frozen=True)
class Policy:
    """What samples."""

    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    folder: Path
    """Where its weights may be written for an engine; nothing else is there."""
    passes: Callable[[], AbstractContextManager[None]]
    """Holds the model ready for passes: precision, and whole weights where they are sharded."""


@dataclass(frozen=True)
class Sampling:
    """How completions are sampled; see :func:`tpmm_pl.rollouts.sampling.sample_completions`."""

    samples: int
    max_new_tokens: int
    temperature: float
    key: str
    batch_size: int
    title: str

    def seed(self, prompt: Prompt) -> int:
        """Return a seed of a prompt's samples, for engines that draw noise of their own."""
        digest = sha256(f"{self.key}/{prompt.prompt_id}".encode()).digest()
        return int.from_bytes(digest[:4], "big") >> 1


class Generation(Protocol):
    """Samples completions of a policy."""

    def __call__(
        self, policy: Policy, prompts: Sequence[Prompt], sampling: Sampling
    ) -> list[Completion]:
        """Return ``sampling.samples`` completions a prompt, all of a prompt together, in order.

        All processes call it, each with prompts of its own.
        """
        ...


class TransformersGeneration:
    """Samples in this process, by transformers."""

    def __call__(
        self, policy: Policy, prompts: Sequence[Prompt], sampling: Sampling
    ) -> list[Completion]:
        """Return what :func:`tpmm_pl.rollouts.sampling.sample_completions` returns."""
        with policy.passes():
            return sample_completions(policy.model, policy.tokenizer, prompts, **asdict(sampling))


@contextmanager
def written_policy(policy: Policy) -> Iterator[Path]:
    """Write the policy as a Hugging Face folder for an engine; it is deleted behind the block.

    Adapters are merged into a copy of their model. The first process writes, all wait for it.

    Yields:
        The folder, absolute.

    Raises:
        InputError: If a sharded policy has adapters.
    """
    folder = policy.folder.absolute()
    model: Any = policy.model
    sharded = is_sharded(model)
    if sharded and isinstance(model, PeftModel):
        raise InputError(
            "adapters of a sharded policy cannot be merged for another engine; let transformers"
            " generate, or train with the strategy ddp"
        )
    state = whole_state(model) if sharded else None

    def write() -> None:
        plain = deepcopy(model).merge_and_unload() if isinstance(model, PeftModel) else model
        export_model(plain, policy.tokenizer, state, folder)

    processes.from_first(write)
    try:
        yield folder
    finally:
        if processes.is_first():
            shutil.rmtree(folder, ignore_errors=True)
