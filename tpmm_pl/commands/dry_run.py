"""``tpmm fit --dry_run``: what a fit will need of memory, disk and time, without training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import nn

from tpmm_pl.callbacks.round_end import RoundCallback
from tpmm_pl.commands.estimates.disk import disk, disk_rows, folder_bytes
from tpmm_pl.commands.estimates.memory import (
    Memory,
    available,
    memory,
    memory_rows,
    memory_warning,
    source_of,
)
from tpmm_pl.commands.estimates.table import Row, table
from tpmm_pl.commands.estimates.times import Speed, speed, time_rows
from tpmm_pl.commands.estimates.workload import (
    Workload,
    devices,
    plain_workload,
    round_workload,
)
from tpmm_pl.models.blueprint import blueprint, stored_bytes


def dry_run(trainer: Trainer, module: Any, data: Any, root: Path, *, overwrite: bool) -> str:
    """Return the estimate of a fit as a table.

    Sizes are counted on the model's configuration. Times are measured where the model fits into
    the memory that is free; its weights are not changed, and nothing is written into the folder of
    the run. Models and pairs are fetched, made and cached as the fit itself would.

    Args:
        trainer: Of the fit; its ``default_root_dir`` is a folder to throw away.
        module: Of the fit.
        data: Of the fit.
        root: Folder of the run.
        overwrite: Whether what is in the folder is kept until the fit has ended.

    Raises:
        InputError: If the settings or the data are at fault.
    """
    with torch.random.fork_rng():
        return _estimate(trainer, module, data, root, overwrite)


def _estimate(trainer: Trainer, module: Any, data: Any, root: Path, overwrite: bool) -> str:
    _attach(trainer, module, data)
    callbacks: Any = trainer.callbacks  # type: ignore[attr-defined]
    model = trainer.precision_plugin.convert_module(blueprint(source_of(module)))
    for callback in callbacks:
        if isinstance(callback, RoundCallback):
            callback.setup(trainer, module, "fit")
            callback.check_policy(model)
    data.prepare_data()
    data.setup("fit")
    in_rounds = any(isinstance(callback, RoundCallback) for callback in callbacks)
    count = round_workload if in_rounds else plain_workload
    work = count(trainer, module, data, callbacks)
    needed = memory(model, module, trainer, data, work)
    found = None
    if _fits(model, needed, trainer.strategy.root_device):
        found = _measured(trainer, module, data, callbacks, work)
        if found.kept is not None:
            kept = round(found.kept * data.token_budget)
            needed = replace(needed, activations=kept, logits=0, measured=True)
    written = disk(model, module, callbacks, work, _tokenizer_bytes(data, trainer))
    there = 0 if overwrite else folder_bytes(root)
    on_disk, short = disk_rows(written, root, there=there)
    too_large = Row("not measured", "", "the model does not fit into the memory that is free")
    sections = {
        f"dry run of {root}: nothing is trained, nothing is written there": _of_model(model),
        f"memory, {_place(trainer)}": memory_rows(needed, trainer, data, work),
        "disk": on_disk,
        "work": _of_work(work, in_rounds),
        "time": [too_large] if found is None else time_rows(found, work, devices(trainer)),
    }
    warnings = [one for one in (memory_warning(needed, trainer), short) if one is not None]
    return "\n\n".join([table(sections), *(f"warning: {one}" for one in warnings)])


def _measured(
    trainer: Trainer, module: Any, data: Any, callbacks: Sequence[Any], work: Workload
) -> Speed:
    loaded = trainer.precision_plugin.convert_module(source_of(module).load_model())
    loaded.to(trainer.strategy.root_device)
    rewards = hasattr(module, "reward_source")
    return speed(loaded, trainer, data, callbacks, work, rewards=rewards)


def _attach(trainer: Trainer, module: Any, data: Any) -> None:
    # what a fit does first; the data modules ask the trainer for its module
    trainer.strategy.connect(module)
    module.trainer = data.trainer = trainer


def _of_model(model: nn.Module) -> list[Row]:
    inner = getattr(model, "get_base_model", lambda: model)()
    total = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return [
        Row("parameters", f"{total:,}", f"{type(inner).__name__}, counted"),
        Row("  that train", f"{trained:,}", f"{100 * trained / total:.3g} %"),
    ]


def _of_work(work: Workload, in_rounds: bool) -> list[Row]:
    a_round = "a round" if in_rounds else "in all"
    known = "at most: as many as completions can make" if work.sampled_pairs else "counted"
    rows = [
        Row("rounds" if in_rounds else "epochs", f"{work.rounds if in_rounds else work.epochs:,}"),
        Row(f"pairs {'a round' if in_rounds else 'an epoch'}", f"{work.pairs.count:,}", known),
        Row("  their tokens", f"{work.pairs.tokens:,}", "prompt once a pair; of the first round"),
        Row(f"steps {a_round}", f"{work.steps:,}", f"of {work.pairs_a_step} pairs"),
    ]
    if in_rounds:
        rows.append(Row("steps of the run", f"{work.rounds * work.steps:,}"))
    if work.sampled.count:
        budget = f"at most {work.sampled.tokens:,} tokens"
        rows.append(Row("completions of the run", f"{work.sampled.count:,}", budget))
    return rows


def _place(trainer: Trainer) -> str:
    where = f"{devices(trainer)} x {trainer.strategy.root_device.type}"
    return f"each of {where} ({type(trainer.strategy).__name__}, {trainer.precision})"


def _fits(model: nn.Module, needed: Memory, device: torch.device) -> bool:
    # weights are read into the processor's memory first, whole on every device here
    here = available(torch.device("cpu")) > stored_bytes(model)
    passing = needed.gradients + needed.passing + needed.weights
    return here and available(device) > max(passing, stored_bytes(model))


def _tokenizer_bytes(data: Any, trainer: Trainer) -> int:
    folder = Path(trainer.default_root_dir) / "tokenizer"
    data.tokenizer.save_pretrained(folder)
    return folder_bytes(folder)
