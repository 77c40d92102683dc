"""Steps whose loss or gradient is not finite change nothing, and end a run unless it may skip."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from math import inf, nan
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor
from torch.amp import GradScaler

from tests.modules.steps import PAIRS, POLICY, REWARD, SOME, fit
from tpmm_pl.callbacks import FitCheckpoint
from tpmm_pl.callbacks.round_checkpoint import CHECKPOINT
from tpmm_pl.modules.dpo import DPOModule
from tpmm_pl.modules.not_finite import not_finite, poisoned
from tpmm_pl.modules.reward import RewardModule
from tpmm_pl.types import InputError, PairBatch, RunError

PLAIN = partial(torch.optim.AdamW, lr=1e-3)
FUSED = partial(torch.optim.AdamW, lr=1e-3, fused=True)
optimizers = pytest.mark.parametrize("optimizer", [PLAIN, FUSED], ids=["plain", "fused"])


class Breaks(Callback):
    """Makes what a step works on infinite or no number, in some batches."""

    def __init__(self, *batches: int, value: float = inf, pair: int = 0) -> None:
        self.batches = batches
        self.value = value
        self.pair = pair

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx in self.batches:
            self.spoil(batch[0])

    def spoil(self, micro: PairBatch) -> None:
        micro.reference.chosen[self.pair] = self.value


class BreaksMargin(Breaks):
    def spoil(self, micro: PairBatch) -> None:
        micro.margin[self.pair] = self.value


def weights(module: LightningModule) -> list[Tensor]:
    return [parameter.detach() for parameter in module.parameters()]


def same(a: LightningModule, b: LightningModule) -> bool:
    return all(map(torch.equal, weights(a), weights(b)))


def good_batches(count: int) -> list[Any]:
    """Return the pairs of ``count`` batches of two, the same two again and again."""
    return PAIRS[:2] * count


@pytest.mark.parametrize("size", [1.0, 0.3, 1e-30, -7.0])
def test_a_finite_loss_keeps_its_value_and_gradient_to_the_bit(size: float) -> None:
    x = torch.tensor([size, 3.0], requires_grad=True)
    (plain,) = torch.autograd.grad((x * x).sum(), x)
    loss = poisoned((x * x).sum())
    assert torch.equal(loss.detach(), (x * x).sum().detach())
    assert torch.equal(torch.autograd.grad(loss, x)[0], plain)


@pytest.mark.parametrize("value", [inf, -inf, nan])
def test_a_loss_that_is_not_finite_has_no_finite_gradient(value: float) -> None:
    # the gradient of the sum alone would be 1
    x = torch.tensor([1.0, value], requires_grad=True)
    (gradient,) = torch.autograd.grad(poisoned(x.sum()), x)
    assert not gradient.isfinite().any()
    assert bool(not_finite([torch.ones(3), gradient]))
    assert not bool(not_finite([torch.ones(3)]))


@optimizers
def test_a_broken_loss_ends_the_run_naming_pair_step_and_batch(optimizer: Any) -> None:
    module = DPOModule(POLICY, optimizer, epochs_per_round=2)
    message = (
        r"the loss of 1 pair, row 5 \(prompt p5\), is not finite in optimizer step 2, batch 2 of"
        r" epoch 0, round 1; set model.gradient_clip_val or model.skip_non_finite, or start over"
        " with a lower learning rate"
    )
    breaks = Breaks(2, pair=1)
    with pytest.raises(RunError, match=f"^{message}$"):
        fit(module, batch_size=2, others=[breaks], log_every_n_steps=1)
    stopped_before = DPOModule(POLICY, optimizer)
    fit(stopped_before, PAIRS[:4], batch_size=2)
    assert same(module, stopped_before)


def test_a_pair_is_named_by_its_row_in_whatever_micro_batch_it_is() -> None:
    module = RewardModule(REWARD, FUSED)
    with pytest.raises(RunError, match=r"the loss of 1 pair, row 3 \(prompt p3\), is not finite"):
        fit(module, token_budget=SOME, others=[LastMicroBatch(0)], log_every_n_steps=1)


class LastMicroBatch(BreaksMargin):
    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        # of six pairs within the budget: 0, 1, 2 | 3, 4 | 5
        self.spoil(batch[1])


@optimizers
@pytest.mark.parametrize("make", [DPOModule, RewardModule])
def test_a_skipped_step_leaves_weights_and_moments_as_they_were(make: Any, optimizer: Any) -> None:
    source, breaks = (POLICY, Breaks) if make is DPOModule else (REWARD, BreaksMargin)
    module, whole = (make(source, optimizer, skip_non_finite=n) for n in (2, 0))
    watch = fit(module, good_batches(4), batch_size=2, others=[breaks(0, 2)], log_every_n_steps=1)
    # of four steps two are left: Adam's moments and count of steps are theirs
    fit(whole, good_batches(2), batch_size=2)
    assert same(module, whole)
    assert [metrics["skipped_steps"] for metrics in watch.metrics[1:]] == [1, 1, 2]
    assert watch.counts == [1, 2, 3, 4]


@optimizers
def test_one_step_more_than_may_be_skipped_ends_the_run(optimizer: Any) -> None:
    module = DPOModule(POLICY, optimizer, skip_non_finite=1)
    with pytest.raises(RunError, match="in optimizer step 2, batch 2 of epoch 0"):
        fit(module, good_batches(4), batch_size=2, others=[Breaks(1, 2)], log_every_n_steps=1)


@optimizers
def test_a_gradient_alone_that_is_not_finite_is_left_out(optimizer: Any) -> None:
    module, whole = (DPOModule(POLICY, optimizer, skip_non_finite=n) for n in (1, 0))
    fit(module, good_batches(2), batch_size=2, others=[BadBackward(0)], log_every_n_steps=1)
    fit(whole, good_batches(1), batch_size=2)
    assert same(module, whole)
    module = DPOModule(POLICY, optimizer)
    with pytest.raises(RunError, match=r"^the gradient is not finite in optimizer step 0, batch 0"):
        fit(module, others=[BadBackward(0)])


class BadBackward(Callback):
    """Has the last layer's gradient infinite in one batch."""

    def __init__(self, batch: int) -> None:
        self.batch = batch

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx == self.batch:
            *_, weight = pl_module.parameters()
            self._handle = weight.register_hook(lambda gradient: gradient * inf)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx == self.batch:
            self._handle.remove()


def test_values_are_looked_at_where_the_logger_does_and_at_the_epochs_end() -> None:
    broken = Breaks(1)
    looks: list[int] = []

    class Counted(DPOModule):
        def _look(self) -> None:
            looks.append(self.global_step)
            super()._look()

    fit(Counted(POLICY, FUSED), good_batches(6), batch_size=2, log_every_n_steps=4)
    assert looks == [1, 5, 6]
    with pytest.raises(RunError, match="in optimizer step 1, batch 1 of"):
        fit(
            Counted(POLICY, FUSED),
            good_batches(6),
            batch_size=2,
            others=[broken],
            log_every_n_steps=4,
        )


@pytest.mark.parametrize("every", [1, 50])
def test_the_checkpoint_before_the_broken_step_stays(every: int, tmp_path: Path) -> None:
    path = tmp_path / CHECKPOINT
    message = f"the last good state is {path}: set .* and go on with --ckpt_path last, or"
    module = DPOModule(POLICY, FUSED)
    with pytest.raises(RunError, match=message):
        checkpointed(module, tmp_path, [Breaks(2)], log_every_n_steps=every)
    assert torch.load(path, weights_only=True)["global_step"] == 2


def test_weights_that_overflow_are_not_written(tmp_path: Path) -> None:
    class Overflow(DPOModule):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            self.trainer.optimizers[0].param_groups[0]["lr"] = 3e38 if batch_idx == 2 else 1e-3

    steep = partial(torch.optim.SGD, weight_decay=10.0)
    with pytest.raises(RunError, match=r"^the weights are not finite after optimizer step 2; "):
        checkpointed(Overflow(POLICY, steep), tmp_path, [])
    state = torch.load(tmp_path / CHECKPOINT, weights_only=True)
    assert state["global_step"] == 2
    assert not bool(not_finite(list(state["state_dict"].values())))
    # also where nobody writes a checkpoint: the end of an epoch is the snapshot's
    with pytest.raises(RunError, match=r"^the weights are not finite after optimizer step 2; "):
        fit(Overflow(POLICY, steep), batch_size=2)


def test_the_count_goes_on_after_a_resume(tmp_path: Path) -> None:
    first = DPOModule(POLICY, FUSED, skip_non_finite=2)
    checkpointed(first, tmp_path, [Breaks(0, 1)])
    state = torch.load(tmp_path / CHECKPOINT, weights_only=True)
    assert state["skipped_steps"] == first.skipped_steps == 2
    again = DPOModule(POLICY, FUSED, skip_non_finite=2)
    again.on_load_checkpoint(state)
    with pytest.raises(RunError, match="in optimizer step 0"):
        fit(again, others=[Breaks(0)])
    again.on_load_checkpoint({})  # of an older version
    assert again.skipped_steps == 0


def test_a_scaler_leaves_steps_out_until_it_scales_no_more() -> None:
    def steps(scale: float) -> list[int]:
        precision = MixedPrecision("16-mixed", "cpu", GradScaler("cpu", init_scale=scale))
        counts: list[int] = []

        class Counted(DPOModule):
            def training_step(self, batch: list[PairBatch], batch_idx: int) -> Tensor:
                counts.append(batch_idx)
                return super().training_step(batch, batch_idx)

        module, breaks = Counted(POLICY, FUSED), Breaks(0, 1, 2)
        plugins: dict[str, Any] = {"plugins": precision, "log_every_n_steps": 1}
        with pytest.raises(RunError, match="not finite in optimizer step"):
            fit(module, batch_size=2, others=[breaks], **plugins)
        return counts

    assert steps(1.0) == [0]
    assert steps(4.0) == [0, 1, 2]


@pytest.mark.parametrize("make", [partial(DPOModule, POLICY), partial(RewardModule, REWARD)])
def test_a_negative_number_of_steps_is_refused(make: Any) -> None:
    with pytest.raises(InputError, match="skip_non_finite is -1; it must not be negative"):
        make(FUSED, skip_non_finite=-1)


def checkpointed(
    module: LightningModule, root: Path, others: Sequence[Callback], **settings: Any
) -> None:
    """Train on three batches with a checkpoint after each."""
    usual: dict[str, Any] = {"default_root_dir": root, "enable_checkpointing": True}
    callbacks = [*others, FitCheckpoint(every_n_steps=1)]
    fit(module, batch_size=2, others=callbacks, **{**usual, **settings})
