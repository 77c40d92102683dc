"""Fits and passes inside a fit: Lightning Fabric with the trainer's own device and precision."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from lightning.fabric import Fabric
from lightning.pytorch import LightningModule, Trainer
from tqdm.auto import tqdm


def fabric_like(trainer: Trainer) -> Fabric:
    """Return a Fabric with the accelerator, the precision and this process's device of ``trainer``.

    What several processes add up goes through the trainer's process group
    (:mod:`tpmm_pl.processes`): passes and fits inside a fit share work, they wrap no module.

    Args:
        trainer: A trainer whose strategy has been set up.
    """
    index = trainer.strategy.root_device.index
    fabric = Fabric(
        accelerator=trainer.accelerator.name(),
        devices=1 if index is None else [index],
        precision=trainer.precision,
        loggers=[],
    )
    fabric.launch()
    return fabric


def fit_with_fabric(
    fabric: Fabric, module: LightningModule, batches: Iterable[Any], *, title: str
) -> None:
    """Train a LightningModule on ``batches``, once each, outside of a Trainer.

    A module with manual optimisation steps by itself and returns no loss. A module may end the
    fit early by a true attribute ``finished``.

    Args:
        fabric: A launched Fabric.
        module: ``configure_optimizers`` returns one optimizer, or Lightning's dictionary with a
            schedule stepped once a batch.
        batches: What ``training_step`` takes; its length, if any, is the progress bar's.
        title: Shown before the progress bar, which is silent when not on a terminal.
    """
    configured: Any = module.configure_optimizers()
    schedule = None
    if isinstance(configured, dict):
        schedule = configured["lr_scheduler"]["scheduler"]
        configured = configured["optimizer"]
    model, optimizer = fabric.setup(module, configured)
    for index, batch in enumerate(tqdm(batches, desc=title, leave=False, disable=None)):
        loss = model.training_step(fabric.to_device(batch), index)
        if loss is not None:
            optimizer.zero_grad()
            fabric.backward(loss)
            optimizer.step()
        if schedule is not None:
            schedule.step()
        if getattr(module, "finished", False):
            break
