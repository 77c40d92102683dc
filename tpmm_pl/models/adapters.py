"""Low-rank adapters on a frozen model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import cast

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel

from tpmm_pl.registry import lookup
from tpmm_pl.types import InputError


@dataclass(frozen=True)
class LoraSettings:
    """Low-rank adapters on a frozen model (Hu et al. 2021).

    A fresh adapter changes nothing: the policy starts as the frozen model, bit for bit.
    """

    r: int = 16
    """Rank."""
    alpha: int = 32
    """The update is scaled by ``alpha / r``."""
    target_modules: str | list[str] = "all-linear"
    """Names of the adapted layers; ``all-linear``: every linear layer but the head."""
    dropout: float = 0.0
    """Above 0 a fresh policy no longer computes what its reference does while it trains."""
    use_rslora: bool = False
    """Scale by ``alpha / sqrt(r)`` instead (Kalajdzievski 2023)."""
    use_dora: bool = False
    """Train the length of every row apart from its direction (Liu et al. 2024, eq. 5). Several
    such adapters have no merge that is one: references of one snapshot only."""


def with_adapters(
    model: PreTrainedModel, lora: LoraSettings, *, task_type: str, trained: Sequence[str] = ()
) -> PreTrainedModel:
    """Return a PeftModel with fresh adapters, which forwards to the model it wraps.

    Args:
        model: Its weights are frozen.
        lora: Rank, scale and layers.
        task_type: As peft names it.
        trained: Modules that train, and are saved, whole.
    """
    config = LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        target_modules=lora.target_modules,
        lora_dropout=lora.dropout,
        use_rslora=lora.use_rslora,
        use_dora=lora.use_dora,
        task_type=task_type,
        modules_to_save=list(trained) or None,
    )
    return cast(PreTrainedModel, get_peft_model(model, config))


def check_quantization(name: str, lora: LoraSettings | None) -> None:
    """Refuse a quantisation that is unknown, cannot train or cannot run here.

    Args:
        name: ``4bit`` or ``8bit``.
        lora: What trains on top.

    Raises:
        InputError: Naming the way out.
    """
    lookup("quantization", name, dict.fromkeys(("4bit", "8bit")))
    if lora is None:
        raise InputError(
            f"quantization {name} freezes the weights, so nothing would train; set lora too"
        )
    if lora.use_dora and name == "8bit":
        raise InputError(
            "quantization 8bit does not give the rows' lengths that lora.use_dora needs; take 4bit,"
            " or leave one out"
        )
    if find_spec("bitsandbytes") is None:
        raise InputError(
            f"quantization {name} needs bitsandbytes; pip install 'tpmm_pl[qlora]', or leave"
            " quantization out"
        )


def quantization_config(name: str, dtype: torch.dtype) -> BitsAndBytesConfig:
    """Return how the frozen weights are stored; ``4bit`` is QLoRA's (Dettmers et al. 2023).

    Args:
        name: ``4bit`` (NormalFloat, with quantised constants) or ``8bit``.
        dtype: Of the products with 4-bit weights.
    """
    if name == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


def keep_gradients(model: nn.Module) -> None:
    """Keep 4-bit layers on a CPU differentiable after a pass in evaluation mode.

    There bitsandbytes packs their weights for inference and does not unpack them to train: the
    gradient through the frozen weights would be missing without a word.
    """
    for module in model.modules():
        if "support_avx512bf16_for_cpu" in vars(module):
            vars(module)["support_avx512bf16_for_cpu"] = False
