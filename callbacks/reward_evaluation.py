"""A printed row for every validation of a reward model."""

from __future__ import annotations

from collections.abc import Mapping

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn

_COLUMNS = ("accuracy", "margin", "calibration_error")
_HEADS = ("accuracy", "margin", "calib.err")


class RewardEvaluation(Callback):
    """Prints what a reward model's validation measured: by domain, a row a validation.

    It reads ``eval/<metric>/<domain>`` as :class:`tpmm_pl.modules.reward.RewardModule` logs them.
    ``measured_step`` is the optimizer step of the newest row, -1 before the first.
    """

    def __init__(self) -> None:
        self.measured_step = -1

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        measured = {name: float(value) for name, value in trainer.callback_metrics.items()}
        domains = domains_of(measured)
        if not domains or trainer.sanity_checking:
            return
        begins = self.measured_step < 0
        self.measured_step = trainer.global_step
        if not trainer.is_global_zero:
            return
        if begins:
            print(table_header(domains))
        # within a fit the counter is one behind, after it the epoch is counted
        epoch = trainer.current_epoch + (trainer.state.fn == TrainerFn.FITTING)
        print(table_row(epoch, trainer.global_step, measured), flush=True)


def domains_of(measured: Mapping[str, float]) -> list[str]:
    """Return the domains that an accuracy was measured in, in their order."""
    area = "eval/accuracy/"
    return [name.removeprefix(area) for name in measured if name.startswith(area)]


def table_header(domains: list[str]) -> str:
    """Return the two lines over the rows."""
    above = "".join(f"  {domain.replace('_', ' '):^29}" for domain in domains)
    heads = "".join("  " + " ".join(f"{head:>9}" for head in _HEADS) for _ in domains)
    return f"{'':>11}{above}\n{'epoch':>5} {'step':>5}{heads}"


def table_row(epoch: int, step: int, measured: Mapping[str, float]) -> str:
    """Return a row: accuracy, mean margin and calibration error by domain."""
    cells = "".join(
        "  " + " ".join(f"{measured[f'eval/{name}/{domain}']:>9.3f}" for name in _COLUMNS)
        for domain in domains_of(measured)
    )
    return f"{epoch:>5} {step:>5}{cells}"
