"""``tpmm upcycle``: a dense reward model becomes a mixture of experts."""

from __future__ import annotations

from pathlib import Path

import torch

from tpmm_pl.commands.output import refuse_existing, report
from tpmm_pl.models.load import load_reward_model
from tpmm_pl.models.moe_checkpoint import is_moe_folder, save_moe
from tpmm_pl.models.padding import separate_padding, use_padding
from tpmm_pl.moe.convert import moe_layers, upcycle
from tpmm_pl.moe.routing import MoESettings
from tpmm_pl.types import InputError


def upcycle_model(
    model: str,
    out: Path,
    experts: int = 8,
    active: int = 6,
    shared: int = 1,
    normalise: bool = True,
    noise: bool = True,
    reinitialise: float = 0.0,
    seed: int = 0,
    dtype: str = "float32",
    overwrite: bool = False,
    json: bool = False,
) -> None:
    """Replace every feed-forward layer of a reward model by experts that are copies of it.

    Args:
        model: Hub id or folder of a sequence-classification model with one output.
        out: Folder to write, for training (`model.reward.name_or_path`) and `tpmm consolidate`.
        experts: Experts a layer, the shared ones included.
        active: Experts a token goes through, the shared ones included.
        shared: Experts that every token goes through.
        normalise: Whether gates sum to 1, so that the mixture computes what the dense model does.
        noise: Whether the router's logits are noisy in training.
        reinitialise: Share of the units of every routed expert that is drawn afresh.
        seed: Of the router and of drawn units.
        dtype: Of the weights.
        overwrite: Replace the folder if it exists.
        json: Print one JSON object and nothing else.

    Raises:
        InputError: If the model cannot be upcycled, or the folder exists.
    """
    settings = MoESettings(experts, active, shared, normalise, noise, reinitialise)
    refuse_existing(out, overwrite=overwrite)
    if Path(model).is_dir() and is_moe_folder(Path(model)):
        raise InputError(f"{model} is a mixture of experts already; give the dense model")
    dense, tokenizer = load_reward_model(model, dtype=dtype)
    separate_padding(tokenizer)
    use_padding(dense, int(tokenizer.pad_token_id))
    before = sum(p.numel() for p in dense.parameters())
    upcycle(dense, settings, generator=torch.Generator().manual_seed(seed))
    save_moe(dense, tokenizer, out)
    after = sum(p.numel() for p in dense.parameters())
    found = {
        "out": str(out), "layers": len(moe_layers(dense)), "experts": experts, "active": active,
        "parameters_dense": before, "parameters": after,
    }  # fmt: skip
    report(
        f"{out}: {found['layers']} layers of {experts} experts, {active} active; "
        f"{before / 1e6:.1f} M parameters became {after / 1e6:.1f} M",
        found,
        json=json,
    )
