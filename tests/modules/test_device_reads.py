"""A training step does not look at values: on an accelerator that would wait for it."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from functools import partial
from operator import methodcaller
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.models.tiny import tiny_reward_model
from tests.modules.steps import PAIRS, POLICY, REWARD, SOME, fit
from tests.modules.twenty_steps import LargeStart
from tpmm_pl.modules.dpo import DPOModule
from tpmm_pl.modules.reward import RewardModule
from tpmm_pl.types import InputError, PairBatch, RunError

FUSED = partial(torch.optim.AdamW, lr=1e-3, fused=True)
# what reads a value on the host, or asks for a size that only values tell
READING = {
    *("_local_scalar_dense", "is_nonzero", "bincount", "nonzero"),
    *("masked_select", "equal", "_unique2"),
    *("unique_consecutive", "unique_dim", "repeat_interleave"),
}
COPYING = ("cpu", "numpy", "tolist", "__array__")


class Reads(TorchDispatchMode):
    """Notes where values of tensors are read while it is on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: list[str] = []
        self.on = False
        for name in COPYING:
            monkeypatch.setattr(Tensor, name, self._noted(getattr(Tensor, name)))

    def __enter__(self) -> Reads:
        self.on = True
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *raised: Any) -> None:
        self.on = False
        super().__exit__(*raised)  # type: ignore[no-untyped-call]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = func.overloadpacket.__name__
        sizes = name.startswith("index") and any(
            isinstance(index, Tensor) and index.dtype == torch.bool
            for index in (args[1] if isinstance(args[1], list | tuple) else ())
        )
        if name in READING or sizes:
            self._note(name)
        return func(*args, **(kwargs or {}))

    def _noted(self, method: Callable[..., Any]) -> Callable[..., Any]:
        def reading(tensor: Tensor, *args: Any, **settings: Any) -> Any:
            if self.on:
                self._note(method.__name__)
            return method(tensor, *args, **settings)

        return reading

    def _note(self, name: str) -> None:
        calls = traceback.extract_stack()
        # a processor's attention goes chain by chain; an accelerator's takes none of this
        if not any(call.filename.endswith("tree_attention.py") for call in calls):
            ours = [c for c in calls if "tpmm_pl" in Path(c.filename).parts]
            self.found.append(" < ".join(f"{c.name}:{c.lineno}" for c in reversed(ours)) or name)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Reads:
    return Reads(monkeypatch)


def watched(module: Any, reads: Reads) -> list[int]:
    """Let a module's steps be watched; return the list that counts the reads of each."""
    step, counts = module.training_step, []

    def training_step(batch: list[PairBatch], batch_idx: int) -> Tensor:
        before = len(reads.found)
        with reads:
            loss: Tensor = step(batch, batch_idx)
        counts.append(len(reads.found) - before)
        return loss

    module.training_step = training_step
    return counts


@pytest.mark.parametrize(
    "read",
    [
        *map(methodcaller, ("item", "tolist", "cpu", "numpy", "nonzero", "unique")),
        lambda tensor: tensor.long().bincount(),
        *(bool, float, int, lambda tensor: tensor[tensor > 0], lambda tensor: tensor.equal(tensor)),
    ],
)
def test_every_way_to_look_at_a_value_is_noticed(read: Callable[..., Any], reads: Reads) -> None:
    with reads:
        tensor = torch.ones(2)[:1] * 2
        assert reads.found == []
        read(tensor)
    assert len(reads.found) == 1


@pytest.mark.parametrize("settings", [{}, {"gradient_clip_val": 0.1}, {"loss": ["simpo", "sft"]}])
def test_a_step_of_a_policy_looks_at_no_value(settings: dict[str, Any], reads: Reads) -> None:
    module = DPOModule(POLICY, FUSED, **settings)
    counts = watched(module, reads)
    fit(module, [*PAIRS, *PAIRS], token_budget=SOME)
    assert reads.found == []
    assert counts == [0, 0]


def test_a_step_of_a_reward_model_looks_at_values_no_more_often_than_the_logger(
    reads: Reads,
) -> None:
    module = RewardModule(REWARD, FUSED)
    counts = watched(module, reads)
    fit(module, token_budget=SOME, batch_size=1, log_every_n_steps=4)
    assert counts == [1, 0, 0, 0, 0, 0]


def test_rewards_that_are_no_numbers_end_a_fit_when_they_are_looked_at() -> None:
    def broken() -> Any:
        model = tiny_reward_model()
        model.score.weight.data.fill_(float("nan"))
        return model

    with pytest.raises(InputError, match="rewards of the untrained model are not finite"):
        fit(RewardModule(LargeStart(broken), FUSED), batch_size=1, log_every_n_steps=50)
    steep = partial(torch.optim.SGD, lr=1e30)
    with pytest.raises(RunError, match=r"is not finite in optimizer step \d, batch \d of epoch 0"):
        fit(RewardModule(REWARD, steep), batch_size=1, log_every_n_steps=4)
