"""What the stages of a round's end work on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from lightning.fabric import Fabric
from lightning.pytorch import Trainer
from torch import Tensor, nn

from tpmm_pl import processes
from tpmm_pl.data.packing import TOKEN_BUDGET
from tpmm_pl.files import write_text
from tpmm_pl.models.scoring import score_completions
from tpmm_pl.models.sharding import gathered_weights
from tpmm_pl.models.weights import become, materialise
from tpmm_pl.rounds import one_hot
from tpmm_pl.trajectory import TrajectoryStore
from tpmm_pl.types import Completion, Recipe


@dataclass
class RoundContext:
    """What the stages of a round's end work on; made by a trainer's hook or by hand.

    Args:
        policy: The module whose weights are the policy.
        store: The trajectory on disk.
        round_index: The round just finished; 0 before the first.
        final: Whether no round follows.
        given_next: Whether the next round is a checkpoint that was given: nothing trains after
            this one.
        seed: Of everything random in the stages.
        data: Where prompts, pairs and the tokenizer come from.
        receiver: Told the new reference if it is a :class:`tpmm_pl.types.HasReference`.
        fabric: Devices and precision of passes and fits.
        optimizers: Reset when the next policy is set.
        trainer: Saved by the checkpoint stages; absent in a loop of one's own.
        log: Takes metrics as they come.
    """

    policy: nn.Module
    store: TrajectoryStore
    round_index: int
    final: bool = False
    given_next: bool = False
    seed: int = 0
    data: Any = None
    receiver: Any = None
    fabric: Fabric = field(default_factory=lambda: Fabric(accelerator="cpu", devices=1))
    optimizers: Sequence[torch.optim.Optimizer] = ()
    trainer: Trainer | None = None
    log: Callable[[Mapping[str, float]], None] = lambda metrics: None
    next_policy: Recipe | None = None
    """Set by the stage of that name; the newest snapshot otherwise."""
    _holds: tuple[str, Recipe] | None = None
    _trains: tuple[str, Recipe] | None = None

    @property
    def reference_cache(self) -> Path:
        """Folder of log-probabilities, shared by the runs beside this one."""
        return self.store.root.absolute().parent.parent / ".reference"

    @property
    def holds(self) -> Recipe | None:
        """The merge that the policy's module computes as, where it is known to the last bit."""
        return None if self._holds is None or self._holds[0] != "exact" else self._holds[1]

    @property
    def token_budget(self) -> int:
        """Tokens that go through the policy at once in passes and fits."""
        return getattr(self.data, "token_budget", TOKEN_BUDGET)

    def key(self, stage: str) -> str:
        """Name the random draws of a stage."""
        return f"{self.seed}/{self.round_index}/{stage}"

    def generator(self, stage: str) -> torch.Generator:
        """Return a generator that depends on (seed, round, stage) only."""
        digest = sha256(self.key(stage).encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))

    def load(self, recipe: Recipe) -> None:
        """Make the policy's module compute as a recipe does."""
        if self._holds != ("exact", recipe):
            materialise(self.policy, self.store, recipe)
            self._holds = ("exact", recipe)

    @contextmanager
    def passes(self) -> Iterator[None]:
        """Hold the policy ready for passes without gradients, in the run's precision.

        Sharded weights are whole on every process inside, so that each may run passes of its own.
        """
        with self.fabric.autocast(), gathered_weights(self.policy):
            yield

    def scores(self, completions: Sequence[Completion], recipe: Recipe) -> Tensor:
        """Return the log-probabilities of completions under a recipe, ``(len(completions),)``."""
        self.load(recipe)
        with self.passes():
            mine = score_completions(
                self.policy, processes.share(completions), token_budget=self.token_budget
            )
        return torch.tensor(processes.gathered(mine.tolist()), dtype=torch.float32)

    def write(self, path: Path, text: str) -> None:
        """Write a file of the run, from the first process."""
        if processes.is_first():
            write_text(path, text)

    def forget(self) -> None:
        """Say that the module holds something that is no recipe."""
        self._holds = ("unknown", one_hot(self.round_index))

    def load_policy(self) -> None:
        """Put the policy of this round back."""
        self.load(one_hot(self.round_index))

    def set_next_policy(self, recipe: Recipe) -> float:
        """Make a recipe the policy of the next round; return the relative error of doing so."""
        self.next_policy = recipe
        error = become(self.policy, self.store, recipe)
        self._holds = self._trains = ("cut" if error else "exact", recipe)
        return error

    def put_back(self) -> None:
        """Leave in the module what trains next: the next policy, or this round's."""
        if self.next_policy is None:
            if self._holds is not None:
                self.load_policy()
        elif self._holds != self._trains:
            # also where the module holds the same merge exactly: an adapter of another rank
            self.set_next_policy(self.next_policy)


Stage = Callable[[RoundContext], None]
