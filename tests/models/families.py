"""Tiny seeded models of many families, of weights that make attention matter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel

from tests.models.tiny import EOS, PAD
from tpmm_pl.data.packing import Ids
from tpmm_pl.models.scoring import PairScorer
from tpmm_pl.types import Pair

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
    model.eval()
    return model


def _draw_what_starts_at_a_constant(model: nn.Module) -> None:
    # norms and biases too, so that each of them has a part in the result
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data += 0.2 * torch.randn(parameter.shape)


SYSTEM = (2, 3, 4, 5, 6, 7)
QUESTION = (*SYSTEM, 8, 9, 10, 11, 12, 13, 14)
OTHER = (*SYSTEM, 15, 16, 17)
ANSWER = (18, 19, 20, 21, 22, 23, 24, EOS)

PAIRS = [
    Pair("a", "", "", "", QUESTION, ANSWER, (25, 26, 27, EOS)),
    # an answer that is the beginning of another, and one that parts from it
    Pair("a", "", "", "", QUESTION, ANSWER[:3], (*ANSWER[:4], 28, 29, EOS)),
    Pair("b", "", "", "", OTHER, (30, 31, 18, 19, 2, 3, EOS), (20, 21)),
    # goes on with the tokens of another's prompt
    Pair("c", "", "", "", SYSTEM, (8, 9, 25, EOS), (15, 16, EOS)),
]
"""Rows that share a system prompt, prompts and parts of completions; longer than ``WINDOW``."""


def scorers(model: nn.Module) -> tuple[PairScorer, PairScorer]:
    """Return one that packs trees, and one that pads their rows."""
    packed, padded = PairScorer(model), PairScorer(model)
    assert packed._pass.packs, "the model is packed"
    padded._pass.packs = False
    return packed, padded


def alone(model: nn.Module, rows: Sequence[tuple[Ids, Ids]]) -> Tensor:
    """Score one row at a time by the model's own forward, without any padding; ``(N,)`` float64."""
    scores = []
    for prompt, completion in rows:
        logits = model(input_ids=torch.tensor([[*prompt, *completion]])).logits[0].double()
        predicting = logits[len(prompt) - 1 : -1].log_softmax(-1)
        scores.append(predicting[torch.arange(len(completion)), torch.tensor(completion)].sum())
    return torch.stack(scores)


def preference_gradient(model: nn.Module, rows: Tensor) -> Tensor:
    """Return the gradient of the DPO loss of row scores; see :func:`gradient_of`."""
    chosen, rejected = rows.chunk(2)
    return gradient_of(model, -F.logsigmoid(0.1 * (chosen - rejected)).mean())


def gradient_of(model: nn.Module, loss: Tensor) -> Tensor:
    """Return the gradient by all parameters that train as one vector, float64."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
    assert any(g is not None and g.any() for g in gradients)
    found = [
        torch.zeros_like(p) if g is None else g for p, g in zip(parameters, gradients, strict=True)
    ]
    return torch.cat([gradient.flatten().double() for gradient in found])


def distance(found: Tensor, expected: Tensor) -> float:
    """Return the largest difference, relative where a score exceeds 1."""
    expected = expected.detach().double()
    return float(((found.detach().double() - expected).abs() / expected.abs().clamp(min=1)).max())


def relative(found: Tensor, expected: Tensor) -> float:
    """Return the norm of the difference by that of what is expected."""
    return float((found - expected).norm() / expected.norm())
