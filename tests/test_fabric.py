from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.fabric import Fabric
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from tpmm_pl.fabric import fabric_like, fit_with_fabric


class Line(LightningModule):
    """One weight, pulled towards each batch by plain gradient descent at rate 1/4."""

    def __init__(self, *, schedule: bool = False, finish_at: float | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.schedule, self.finish_at = schedule, finish_at
        self.indices: list[int] = []

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD([self.weight], lr=0.25)
        if not self.schedule:
            return optimizer
        halved = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": halved, "interval": "step"}}

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor | None:
        self.indices.append(batch_idx)
        return (self.weight - batch).square()

    @property
    def finished(self) -> bool:
        return self.finish_at is not None and float(self.weight.detach()) >= self.finish_at


class ByItself(Line):
    """Steps by itself and returns no loss."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        self.weight.data += batch


def fabric() -> Fabric:
    return Fabric(accelerator="cpu", devices=1)


def ones(count: int) -> list[Tensor]:
    return [torch.ones(())] * count


def test_every_batch_is_one_step() -> None:
    module = Line()
    fit_with_fabric(fabric(), module, ones(3), title="line")
    # half of the way is left after every step
    assert module.weight.item() == 1 - 0.5**3
    assert module.indices == [0, 1, 2]


def test_a_schedule_is_stepped_once_a_batch() -> None:
    module = Line(schedule=True)
    fit_with_fabric(fabric(), module, ones(2), title="line")
    # half, then three quarters of the way are left
    assert module.weight.item() == 1 - 0.5 * 0.75


def test_a_fit_ends_when_its_module_has_finished() -> None:
    module = Line(finish_at=0.7)
    fit_with_fabric(fabric(), module, ones(9), title="line")
    assert module.indices == [0, 1]


def test_a_module_that_returns_no_loss_steps_by_itself() -> None:
    module = ByItself()
    fit_with_fabric(fabric(), module, ones(3), title="line")
    assert module.weight.item() == 3.0


def test_a_generator_of_batches_will_do() -> None:
    module = Line()
    fit_with_fabric(fabric(), module, iter(ones(1)), title="line")
    assert module.weight.item() == 0.5


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
def test_a_fabric_has_the_devices_and_precision_of_its_trainer(precision: Any) -> None:
    found: list[Fabric] = []

    class Ask(Callback):
        def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            found.append(fabric_like(trainer))

    trainer = Trainer(
        accelerator="cpu",
        max_steps=1,
        precision=precision,
        callbacks=[Ask()],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(
        Line(), DataLoader(TensorDataset(torch.ones(1)), collate_fn=lambda rows: rows[0][0])
    )
    (like,) = found
    assert like.device == trainer.strategy.root_device == torch.device("cpu")
    assert (like.world_size, like.global_rank) == (1, 0)
    with like.autocast():
        product = torch.ones(2, 2) @ torch.ones(2, 2)
    assert product.dtype == (torch.float32 if precision == "32-true" else torch.bfloat16)
    weight = like.setup_module(nn.Linear(2, 2)).weight
    assert weight.dtype == (torch.bfloat16 if precision == "bf16-true" else torch.float32)
