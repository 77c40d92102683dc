"""Models without their weights: what can be told of one before it is loaded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
)

from tpmm_pl.models.adapters import LoraSettings, with_adapters
from tpmm_pl.models.load import PretrainedPolicy, switch_off_dropout
from tpmm_pl.models.location import is_hub_id, loading, located
from tpmm_pl.models.moe_checkpoint import is_moe_folder
from tpmm_pl.models.reward import PretrainedReward
from tpmm_pl.models.source import PolicySource
from tpmm_pl.models.tree_pass import unwrapped

_STORED = {"4bit": 0.53, "8bit": 1.0}
"""Bytes of a quantised weight, the scale of each block of 64 of them included."""


def blueprint(source: PolicySource) -> nn.Module:
    """Return the model that a source makes, on torch's ``meta`` device.

    Of a model of the Hugging Face family the configuration alone is read, from the hub too; other
    sources, and mixtures of experts, are loaded and let go.

    Args:
        source: Is prepared where it has to be loaded.

    Raises:
        InputError: If the configuration or the model cannot be read.
    """
    if isinstance(source, PretrainedPolicy):
        model = _from_config(source, AutoModelForCausalLM, {})
        return _with_adapters(model, source.describe()["lora"], "CAUSAL_LM")
    if isinstance(source, PretrainedReward) and source.moe is None:
        told = source.describe()
        dense = PretrainedPolicy(told["name"], revision=told["revision"], dtype=told["dtype"])
        if is_hub_id(told["name"]) or not is_moe_folder(located(told["name"], None, None)[0]):
            model = _from_config(dense, AutoModelForSequenceClassification, {"num_labels": 1})
            return _with_adapters(model, told["lora"], "SEQ_CLS")
    source.prepare()
    loaded: nn.Module = source.load_model()
    return loaded.to(device="meta")


def stored_bytes(model: nn.Module, quantization: str | None = None) -> int:
    """Return the bytes of a model's parameters, tied ones once, and of its buffers.

    Args:
        model: On any device.
        quantization: ``4bit`` or ``8bit``: of the frozen linear layers but the head.
    """
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers())}
    packed = {} if quantization is None else {id(t): t for t in _packed(model)}
    whole = sum(_bytes(t) for name, t in tensors.items() if name not in packed)
    weights = sum(t.numel() for t in packed.values())
    return whole + round(_STORED.get(quantization or "", 0) * weights)


def saved_bytes(model: nn.Module, tokens: int) -> int | None:
    """Return the bytes that the backbone keeps of so many tokens for the backward pass.

    Counted in one pass without numbers, every token a row of its own, as attention that keeps no
    matrix of scores has it. With checkpointed activations: the inputs of all blocks and what one
    block keeps. Parameters, buffers and the head's logits are not in it.

    Args:
        model: On the ``meta`` device, in the dtype it computes in.
        tokens: That go through the model at once.

    Returns:
        ``None`` for models that cannot be run without numbers, as mixtures of experts.
    """
    inner: Any = unwrapped(model)
    checkpointed = [m for m in inner.modules() if getattr(m, "gradient_checkpointing", False)]
    ids = torch.zeros(tokens, 1, dtype=torch.long, device="meta")
    # of four dimensions: a decoder makes no mask of its own, for which it would read numbers
    mask = torch.zeros(1, 1, 1, 1, device="meta")
    for module in checkpointed:
        module.gradient_checkpointing = False
    try:
        total = kept_bytes(
            model,
            lambda: inner.base_model(
                input_ids=ids,
                position_ids=torch.zeros_like(ids),
                attention_mask=mask,
                use_cache=False,
            ),
        )
    except (RuntimeError, TypeError, NotImplementedError):
        return None
    finally:
        for module in checkpointed:
            module.gradient_checkpointing = True
    if not checkpointed:
        return total
    config = inner.config.get_text_config()
    inputs = config.num_hidden_layers * tokens * config.hidden_size * _dtype(model).itemsize
    return total // int(config.num_hidden_layers) + int(inputs)


def kept_bytes(model: nn.Module, run: Callable[[], Any]) -> int:
    """Return the bytes that a pass keeps for the backward pass, without the model's own.

    Args:
        model: Its parameters and buffers do not count.
        run: The pass, with gradients.
    """
    kept: dict[int, Tensor] = {}
    own = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}

    def keep(tensor: Tensor) -> Tensor:
        kept.setdefault(tensor.untyped_storage()._cdata, tensor)  # alive: its number stays its own
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        run()
    return sum(t.untyped_storage().nbytes() for name, t in kept.items() if name not in own)


def cache_bytes(model: nn.Module) -> int | None:
    """Return the bytes of keys and values of one token, ``None`` for models without them."""
    config = cast(Any, unwrapped(model)).config.get_text_config()
    heads = getattr(config, "num_attention_heads", None)
    if config.is_encoder_decoder or not heads:
        return None
    each = getattr(config, "head_dim", None) or config.hidden_size // heads
    shared = getattr(config, "num_key_value_heads", None) or heads
    size: int = 2 * config.num_hidden_layers * shared * each * _dtype(model).itemsize
    return size


def _from_config(source: PretrainedPolicy, family: Any, options: dict[str, Any]) -> PreTrainedModel:
    name, gguf_file = source.name_or_path, source.gguf_file
    folder: Any = name
    if not is_hub_id(name):
        folder, gguf_file = located(name, gguf_file, source.revision)
    trusted = {"trust_remote_code": source.trust_remote_code}
    read = {"revision": source.revision or "main", **trusted, **options}
    if gguf_file is not None:
        read["gguf_file"] = gguf_file
    config = loading(name, lambda: AutoConfig.from_pretrained(folder, **read))
    dtype = getattr(torch, source.dtype)
    with torch.device("meta"):
        model = loading(name, lambda: family.from_config(config, dtype=dtype, **trusted))
    switch_off_dropout(model)
    if source.gradient_checkpointing:
        # the older name goes with transformers 6
        newer = getattr(model, "activation_checkpointing_enable", None)
        loading(name, newer or model.gradient_checkpointing_enable)
    return cast(PreTrainedModel, model.train())


def _with_adapters(
    model: PreTrainedModel, lora: dict[str, Any] | None, task_type: str
) -> PreTrainedModel:
    if lora is None:
        return model
    heads = []
    if task_type == "SEQ_CLS":
        beside = [(n, m) for n, m in model.named_children() if m is not model.base_model]
        heads = [name for name, part in beside if any(True for _ in part.parameters())]
    settings = LoraSettings(**lora)
    with torch.device("meta"):
        adapted = with_adapters(model, settings, task_type=task_type, trained=heads)
    adapted.train()
    return adapted


def _packed(model: nn.Module) -> list[Tensor]:
    inner: Any = unwrapped(model)
    layers = [m for m in inner.modules() if isinstance(m, nn.Linear)]
    head = inner.get_output_embeddings()
    return [m.weight for m in layers if m is not head and not m.weight.requires_grad]


def _dtype(model: nn.Module) -> torch.dtype:
    return next(model.parameters()).dtype


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
