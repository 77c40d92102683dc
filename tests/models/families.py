"""Tiny seeded models of many families, of weights that make attention matter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel

from tests.models.tiny import EOS, PAD

COMMON: dict[str, Any] = {
    "vocab_size": 32,
    "pad_token_id": PAD,
    "bos_token_id": None,
    "eos_token_id": EOS,
}
SHAPE: dict[str, Any] = COMMON | {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}
GROUPED: dict[str, Any] = SHAPE | {"num_key_value_heads": 2}
WINDOW = 5
"""Of the sliding layers; the rows of the tests are longer."""
MIXED: dict[str, Any] = {
    "sliding_window": WINDOW,
    "layer_types": ["sliding_attention", "full_attention"],
}

CONFIGS: dict[str, dict[str, Any]] = {
    "Llama": GROUPED,
    "Llama, tied": GROUPED | {"tie_word_embeddings": True},
    "Qwen2": GROUPED,
    "Qwen3": GROUPED | {"head_dim": 8},
    "Mistral": GROUPED | {"sliding_window": WINDOW},
    "Gemma2": GROUPED
    | MIXED
    | {
        "head_dim": 8,
        "query_pre_attn_scalar": 8,
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 3.0,
    },
    "Gemma3Text": GROUPED | MIXED | {"head_dim": 8, "query_pre_attn_scalar": 8},
    "GPT2": COMMON | {"n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 128},
    "GPTNeoX": SHAPE,
    "Phi": GROUPED,
    "Phi3": GROUPED | {"sliding_window": WINDOW},
    "SmolLM3": GROUPED,
    "Olmo2": GROUPED,
    "Starcoder2": GROUPED | {"sliding_window": WINDOW},
    "Cohere2": GROUPED | MIXED | {"logit_scale": 0.5},
    "Granite": GROUPED | {"attention_multiplier": 0.4, "logits_scaling": 2.0},
}
"""What each family's configuration is made with."""


def config_of(family: str, **changes: Any) -> Any:
    """Return a configuration whose weights are drawn wide and whose dropout is off."""
    name = family.partition(",")[0]
    settings = CONFIGS.get(family, GROUPED) | {"initializer_range": 0.3} | changes
    config = getattr(transformers, f"{name}Config")(**settings)
    for dropout in ("resid_pdrop", "embd_pdrop", "attn_pdrop", "residual_dropout"):
        if hasattr(config, dropout):
            setattr(config, dropout, 0.0)
    return config


def family_model(family: str, *, attention: str | None = None, **changes: Any) -> PreTrainedModel:
    """Two layers, width 16, vocabulary 32.

    Args:
        family: A name of ``CONFIGS``.
        attention: Name of the attention implementation; ``None``: the model's own choice.
        **changes: Of the configuration.
    """
    return _made(AutoModelForCausalLM, config_of(family, **changes), attention)


def family_reward(family: str, **changes: Any) -> PreTrainedModel:
    """The same with one score in place of the head of a language model."""
    return _made(AutoModelForSequenceClassification, config_of(family, num_labels=1, **changes))


def _made(auto: Any, config: Any, attention: str | None = None) -> PreTrainedModel:
    torch.manual_seed(0)
    model: PreTrainedModel = auto.from_config(config, attn_implementation=attention)
    _draw_what_starts_at_a_constant(model)
    return model.eval()


def _draw_what_starts_at_a_constant(model: nn.Module) -> None:
    # norms and biases too, so that each of them has a part in the result
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data += 0.2 * torch.randn(parameter.shape)


Factory = Callable[[], nn.Module]
