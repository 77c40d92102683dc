"""The Hugging Face folder of a trained reward model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from tpmm_pl import processes
from tpmm_pl.models.card import reward_card
from tpmm_pl.models.reward import export_reward_model
from tpmm_pl.models.sharding import is_sharded
from tpmm_pl.types import InputError


class RewardExport(Callback):
    """Writes ``export/reward`` at the end of a fit, also of one that had nothing left to train.

    A dense model, also one trained by adapters, is a folder for any tool that loads sequence
    classification; a mixture of experts is a folder for ``tpmm consolidate`` and our loaders. A
    model card says what it was trained from and what was measured last.
    """

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        reward = getattr(pl_module, "reward", None)
        tokenizer = getattr(trainer.datamodule, "tokenizer", None)  # type: ignore[attr-defined]
        if reward is None or tokenizer is None:
            raise InputError(
                "RewardExport needs a module with `reward` and a data module with `tokenizer`, not "
                f"{type(pl_module).__name__} and {type(trainer.datamodule).__name__}"  # type: ignore[attr-defined]
            )
        source = getattr(pl_module, "reward_source", None)
        if is_sharded(reward):
            reward = _whole(reward, source)
        if not trainer.is_global_zero:
            return
        # the others are of one batch of training
        known = trainer.callback_metrics.items()
        metrics = {name: float(value) for name, value in known if name.startswith("eval/")}
        card = reward_card({} if source is None else source.describe(), metrics)
        out = Path(trainer.default_root_dir) / "export" / "reward"
        export_reward_model(reward, tokenizer, out, card)


def _whole(model: nn.Module, source: Any) -> Any:
    """Return a model of the source with a sharded one's weights, on the first process alone."""
    state: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        # every process takes part in gathering each
        whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if processes.is_first():
            state[name] = whole.cpu()
    if not processes.is_first():
        return None
    made = source.load_model()
    made.load_state_dict(state)
    return made
