"""The starting policy of the letters task: a small Llama trained on demonstrations, cached."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from lightning.fabric import Fabric
from torch.optim import AdamW
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from tpmm_pl.fabric import fit_with_fabric
from tpmm_pl.modules.sft import DemonstrationBatch, SFTModule
from tpmm_pl.toy.letters import EOS, PAD, TOKEN_IDS, VOCABULARY, demonstration
from tpmm_pl.toy.prompts import random_problem_of
from tpmm_pl.toy.tokenizer import letters_tokenizer
from tpmm_pl.types import IGNORE_INDEX, InputError

_VERSION = 1
"""Raised when demonstrations or training change, so that no stale start is taken for a new one."""

_PAD_ID, _EOS_ID = TOKEN_IDS[PAD], TOKEN_IDS[EOS]


class LettersPolicy:
    """Makes the letters policy once for every setting and shares it between runs.

    The start lies in `cache_dir` under a hash of all settings that shape its weights, as a
    Hugging Face folder; concurrent runs train it once. It is trained on the CPU wherever the run
    itself takes place: so small a model gains little elsewhere, and one start serves all runs.

    Args:
        hidden: Width of the model.
        layers: Number of decoder layers.
        heads: Attention heads a layer.
        ffn: Width of the feed-forward layers.
        steps: Optimizer steps, each on fresh demonstrations.
        batch_size: Demonstrations a step.
        lr: Highest learning rate of AdamW, reached after 5 % of the steps; from there it
            falls to 0 along a cosine.
        seed: Seed of initial weights and demonstrations; independent of the run's seed.
        cache_dir: Where starts are kept, one folder a setting.
    """

    def __init__(
        self,
        *,
        hidden: int = 96,
        layers: int = 3,
        heads: int = 4,
        ffn: int = 256,
        steps: int = 1000,
        batch_size: int = 64,
        lr: float = 3e-3,
        seed: int = 0,
        cache_dir: Path = Path("runs/.sft"),
    ) -> None:
        self.hidden = hidden
        self.layers = layers
        self.heads = heads
        self.ffn = ffn
        self.steps = steps
        self.batch_size = batch_size
        self.lr = lr
        self.seed = seed
        self.cache_dir = Path(cache_dir)

    @property
    def folder(self) -> Path:
        """Where the start lies once it is prepared."""
        content = json.dumps(self.describe(), sort_keys=True, separators=(",", ":"))
        return self.cache_dir / sha256(content.encode()).hexdigest()[:16]

    def prepare(self) -> None:
        """Train and store the start unless it is there; leave global random state as it was."""
        if self.folder.exists():
            return
        self.cache_dir.mkdir(parents=True, exist_ok=True)
        with FileLock(self.cache_dir / f"{self.folder.name}.lock"):
            if not self.folder.exists():
                _store(self.train(), self.folder)

    def train(self) -> PreTrainedModel:
        """Return a newly trained start; the same bits whatever the number of threads."""
        with torch.random.fork_rng(), _one_thread():
            torch.manual_seed(self.seed)
            model = LlamaForCausalLM(self._config())
            module = SFTModule(
                model,
                optimizer=partial(AdamW, lr=self.lr, fused=True),
                total_steps=self.steps,
                warmup_steps=self.steps // 20,
            )
            batches = demonstration_batches(self.seed, self.steps, self.batch_size)
            fabric = Fabric(accelerator="cpu", devices=1)
            fit_with_fabric(fabric, module, batches, title="supervised start")
        return model

    def load_model(self) -> PreTrainedModel:
        """Return the start in training mode; it has no dropout.

        Raises:
            InputError: If it has not been prepared.
        """
        if not self.folder.exists():
            raise InputError(f"no letters policy in {self.folder}; call prepare() first")
        model: PreTrainedModel = LlamaForCausalLM.from_pretrained(
            self.folder, dtype=torch.float32, local_files_only=True
        )
        model.train()
        return model

    def load_tokenizer(self) -> PreTrainedTokenizerBase:
        """Return the task's tokenizer, prepared or not."""
        return letters_tokenizer()

    def describe(self) -> dict[str, Any]:
        """Return the settings that shape the weights."""
        return {
            "source": "letters",
            "version": _VERSION,
            "hidden": self.hidden,
            "layers": self.layers,
            "heads": self.heads,
            "ffn": self.ffn,
            "steps": self.steps,
            "batch_size": self.batch_size,
            "lr": self.lr,
            "seed": self.seed,
        }

    def _config(self) -> LlamaConfig:
        return LlamaConfig(
            vocab_size=len(VOCABULARY),
            hidden_size=self.hidden,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            intermediate_size=self.ffn,
            max_position_embeddings=64,
            attention_dropout=0.0,
            bos_token_id=None,
            eos_token_id=_EOS_ID,
            pad_token_id=_PAD_ID,
        )


@contextmanager
def _one_thread() -> Iterator[None]:
    # so small a model gains little by more, and loses much where the cores are busy
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def demonstration_batches(seed: int, steps: int, batch_size: int) -> list[DemonstrationBatch]:
    """Draw in-domain demonstrations from the train split, right-padded to the longest of a batch.

    Args:
        seed: Seed of problems and answers.
        steps: Number of batches.
        batch_size: Rows of each, N.

    Returns:
        The batches. Their attention masks are all ones: under a causal model no token sees the
        padding behind it, and without a mask attention runs a fifth faster.
    """
    generator = random.Random(f"{seed}/sft")
    return [
        _collate([_demonstration_ids(generator) for _ in range(batch_size)]) for _ in range(steps)
    ]


def _demonstration_ids(generator: random.Random) -> tuple[list[int], list[int]]:
    prompt = random_problem_of(generator, "in_domain", "train")
    answer = demonstration(generator, prompt)
    return [TOKEN_IDS[word] for word in prompt], [TOKEN_IDS[word] for word in answer]


def _collate(rows: Sequence[tuple[list[int], list[int]]]) -> DemonstrationBatch:
    longest = max(len(prompt) + len(answer) for prompt, answer in rows)
    input_ids, labels = [], []
    for prompt, answer in rows:
        padding = longest - len(prompt) - len(answer)
        input_ids.append(prompt + answer + [_PAD_ID] * padding)
        labels.append([IGNORE_INDEX] * len(prompt) + answer + [IGNORE_INDEX] * padding)
    ids = torch.tensor(input_ids)
    return DemonstrationBatch(ids, torch.ones_like(ids), torch.tensor(labels))


def _store(model: PreTrainedModel, folder: Path) -> None:
    partial_folder = folder.with_name(f".{folder.name}.partial")
    # left over by a run that was killed: the caller holds the lock, so nobody is writing to it
    shutil.rmtree(partial_folder, ignore_errors=True)
    model.generation_config = GenerationConfig(eos_token_id=_EOS_ID, pad_token_id=_PAD_ID)
    model.save_pretrained(partial_folder)
    letters_tokenizer().save_pretrained(partial_folder)
    for path in partial_folder.iterdir():
        with path.open("rb+") as written:
            os.fsync(written.fileno())
    partial_folder.replace(folder)
