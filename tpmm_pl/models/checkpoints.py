"""Weights from checkpoint folders of any trainer that writes Hugging Face ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from tpmm_pl.models.location import loading
from tpmm_pl.models.stacking import TRAINED
from tpmm_pl.models.weights import load_state, policy_state
from tpmm_pl.types import InputError

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

_SCALING = ("lora_alpha", "alpha_pattern", "use_rslora", "use_dora")
_CHANGE_THE_MODEL = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Ways of peft to begin an adapter that move a part of the model's own weights into it."""


def load_checkpoint(policy: nn.Module, folder: Path) -> None:
    """Overwrite a policy's weights, or its adapter's, with those of a checkpoint folder.

    Args:
        policy: A Hugging Face model, or a ``PeftModel`` whose adapter is overwritten.
        folder: Written by ``save_pretrained``: a full model of the policy's architecture, or an
            adapter of its rank and scale.

    Raises:
        InputError: If the folder cannot be read or a tensor is missing, extra or of another shape.
    """
    if not folder.is_dir():
        raise InputError(f"no checkpoint folder {folder}; check the path")
    state = _adapter(policy, folder) if isinstance(policy, PeftModel) else _full(policy, folder)
    try:
        load_state(policy, state, folder.name)
    except ValueError as error:
        raise InputError(
            f"the checkpoint {folder} is not of the policy's model: {error}; give checkpoints that"
            " were trained from the same model"
        ) from error


def _full(policy: nn.Module, folder: Path) -> dict[str, Tensor]:
    if not isinstance(policy, PreTrainedModel):
        raise InputError(
            f"the checkpoint {folder} is for a Hugging Face model, not {type(policy).__name__}"
        )
    if (folder / ADAPTER_CONFIG).is_file():
        raise InputError(
            f"the checkpoint {folder} is an adapter, but the policy trains all weights; set lora,"
            " or give merged checkpoints"
        )
    theirs, ours = _json(folder / "config.json").get("model_type"), policy.config.model_type
    if theirs != ours:
        raise InputError(
            f"the checkpoint {folder} is of the model type {theirs}, the policy is {ours}; give"
            " checkpoints that were trained from the same model"
        )

    def load() -> Any:
        return type(policy).from_pretrained(folder, dtype=policy.dtype, output_loading_info=True)

    # what a file lacks is drawn at random, and refused below
    with torch.random.fork_rng(devices=[]):
        model, info = loading(str(folder), load)
    for names, what in (("missing_keys", "lacks"), ("unexpected_keys", "has an extra")):
        if odd := sorted(info[names]):
            raise InputError(
                f"the checkpoint {folder} {what} tensor {odd[0]} ({len(odd)} names differ); give"
                " a folder that save_pretrained wrote whole"
            )
    return policy_state(model)


def _adapter(policy: PeftModel, folder: Path) -> dict[str, Tensor]:
    if not (folder / ADAPTER_WEIGHTS).is_file():
        raise InputError(
            f"the checkpoint {folder} has no {ADAPTER_WEIGHTS}, but the policy trains an adapter;"
            " leave out lora, or give adapter folders"
        )
    theirs, ours = _json(folder / ADAPTER_CONFIG), policy.peft_config[TRAINED].to_dict()
    if (begun := str(theirs.get("init_lora_weights"))).startswith(_CHANGE_THE_MODEL):
        raise InputError(
            f"the adapter {folder} began by {begun}, which changes the model; give models that it"
            " was merged into, without lora"
        )
    for name in _SCALING:
        # older versions of peft leave out what they did not know
        if theirs.get(name, ours[name]) != ours[name]:
            raise InputError(
                f"the adapter {folder} has {name} {theirs[name]}, the policy's {ours[name]}; set"
                " lora as its training had it"
            )
    return loading(str(folder), lambda: load_file(folder / ADAPTER_WEIGHTS))


def _json(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = loading(str(path.parent), lambda: json.loads(path.read_text("utf-8")))
    return content
