"""Tiny seeded sequence classification models of many architectures; nothing is downloaded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    DistilBertConfig,
    GemmaConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MixtralConfig,
    ModernBertConfig,
    OPTConfig,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3Config,
    T5Config,
)

from tpmm_pl.models.load import switch_off_dropout

PAD, EOS = 0, 1
IDS = torch.randint(2, 32, (3, 7), generator=torch.Generator().manual_seed(0))
IDS[:, -1] = EOS
MASK = torch.ones_like(IDS)

_COMMON: dict[str, Any] = {
    "vocab_size": 32,
    "num_labels": 1,
    "pad_token_id": PAD,
    "bos_token_id": None,
    "eos_token_id": EOS,
}
_SHAPE: dict[str, Any] = _COMMON | {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}

CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama": lambda: LlamaConfig(**_SHAPE, num_key_value_heads=1),
    "gpt2": lambda: GPT2Config(**_COMMON, n_embd=16, n_layer=2, n_head=2, n_positions=64),
    "gpt_neox": lambda: GPTNeoXConfig(**_SHAPE),
    "bert": lambda: BertConfig(**_SHAPE),
    "phi3": lambda: Phi3Config(**_SHAPE),
    "qwen3": lambda: Qwen3Config(**_SHAPE, num_key_value_heads=1, head_dim=8),
    "gemma": lambda: GemmaConfig(**_SHAPE, num_key_value_heads=1, head_dim=8),
    "modernbert": lambda: ModernBertConfig(**_SHAPE, cls_token_id=2, sep_token_id=3),
    "distilbert": lambda: DistilBertConfig(**_COMMON, dim=16, hidden_dim=32, n_layers=2, n_heads=2),
    "t5": lambda: T5Config(
        **_COMMON | {"decoder_start_token_id": PAD},
        d_model=16,
        d_ff=32,
        d_kv=8,
        num_layers=2,
        num_heads=2,
    ),
    "opt": lambda: OPTConfig(
        **_COMMON,
        hidden_size=16,
        ffn_dim=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        word_embed_proj_dim=16,
    ),
    "mixtral": lambda: MixtralConfig(**_SHAPE, num_key_value_heads=1, num_local_experts=4),
}
DENSE = [name for name in CONFIGS if name not in ("opt", "mixtral")]


def reward_model(architecture: str, *, seed: int = 0) -> PreTrainedModel:
    """Two layers, width 16, vocabulary 32, one score; weights wide enough to bend activations."""
    torch.manual_seed(seed)
    model: PreTrainedModel = AutoModelForSequenceClassification.from_config(CONFIGS[architecture]())
    switch_off_dropout(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 or name.endswith("bias"):
                parameter.normal_(0, 0.3)
    model.eval()
    return model


def scores(model: PreTrainedModel, ids: Tensor = IDS, mask: Tensor = MASK) -> Tensor:
    """Return one score a row, ``(N,)``, in the model's own mode."""
    logits: Tensor = model(input_ids=ids, attention_mask=mask).logits
    return logits[:, 0]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
