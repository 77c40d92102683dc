"""Models from the hub, a folder or a GGUF file."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from tpmm_pl.models.adapters import (
    LoraSettings,
    check_quantization,
    keep_gradients,
    quantization_config,
    with_adapters,
)
from tpmm_pl.models.location import first_line, lasting_name, loading, located
from tpmm_pl.models.moe_checkpoint import is_moe_folder, load_moe
from tpmm_pl.types import InputError

_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}


class PretrainedPolicy:
    """A causal language model of the Hugging Face family as the starting policy.

    Nothing is read before it is asked for.

    Args:
        name_or_path: Hub id, folder, or ``.gguf`` file.
        gguf_file: Name of the GGUF file within the folder or hub repository.
        revision: Branch, tag or commit on the hub.
        dtype: Of the weights: ``float32``, ``bfloat16``, ``float16`` or ``float64``.
        attn_implementation: As transformers takes it; ``None``: its choice.
        trust_remote_code: Whether to run code that comes with the model.
        lora: Train adapters instead of the weights.
        quantization: Of the weights under ``lora``: ``4bit`` (QLoRA), ``8bit`` or ``None``; needs
            bitsandbytes.
        gradient_checkpointing: Compute activations again in the backward pass instead of keeping
            them: the same gradients for less memory and about a third more time. Their dtype is
            ``trainer.precision``'s.
        chat_template: File with a Jinja template in place of the tokenizer's own.

    Raises:
        InputError: If ``dtype`` is unknown, or ``quantization`` is, cannot run here or lacks
            ``lora``.
    """

    def __init__(
        self,
        name_or_path: str,
        *,
        gguf_file: str | None = None,
        revision: str | None = None,
        dtype: str = "float32",
        attn_implementation: str | None = None,
        trust_remote_code: bool = False,
        lora: LoraSettings | None = None,
        quantization: Literal["4bit", "8bit"] | None = None,
        gradient_checkpointing: bool = False,
        chat_template: Path | None = None,
    ) -> None:
        self.name_or_path = name_or_path
        self.gguf_file = gguf_file
        self.revision = revision
        self.dtype = dtype
        self.attn_implementation = attn_implementation
        self.trust_remote_code = trust_remote_code
        self.lora = lora
        self.quantization = quantization
        self.gradient_checkpointing = gradient_checkpointing
        self.chat_template = chat_template
        _dtype(dtype)
        if quantization is not None:
            check_quantization(quantization, lora)

    def prepare(self) -> None:
        """Fetch the model from the hub, unless it is here.

        Raises:
            InputError: If there is no such folder or file, or the hub cannot be reached.
        """
        self._source()

    def load_model(self) -> PreTrainedModel:
        """Return the model in training mode with dropout off; a PeftModel with ``lora``.

        Raises:
            InputError: If the model cannot be found or is no causal language model.
        """
        model = self._pretrained()
        _forget_gguf(model)
        keep_gradients(model)
        switch_off_dropout(model)
        # an adapter's folder names its base model by this
        model.name_or_path = model.config._name_or_path = lasting_name(self.name_or_path)
        if self.gradient_checkpointing:
            _checkpoint_activations(model, self.name_or_path)
        if self.lora is not None:
            model = with_adapters(model, self.lora, task_type="CAUSAL_LM")
        model.train()
        return model

    def load_tokenizer(self) -> PreTrainedTokenizerBase:
        """Return the tokenizer; without a padding token of its own it pads with the end token.

        Raises:
            InputError: If the tokenizer or the template's file cannot be found.
        """
        options = self._source()
        load = AutoTokenizer.from_pretrained
        tokenizer = loading(self.name_or_path, lambda: load(**options))
        _ensure_padding(tokenizer)
        if self.chat_template is not None:
            if not self.chat_template.is_file():
                raise InputError(f"no chat template at {self.chat_template}; check the path")
            tokenizer.chat_template = self.chat_template.read_text(encoding="utf-8")
        return cast(PreTrainedTokenizerBase, tokenizer)

    def describe(self) -> dict[str, Any]:
        """Return plain JSON values that identify the starting policy."""
        return {
            "name": self.name_or_path,
            "gguf_file": self.gguf_file,
            "revision": self.revision,
            "dtype": self.dtype,
            "lora": None if self.lora is None else asdict(self.lora),
            "quantization": self.quantization,
        }

    def _pretrained(self) -> PreTrainedModel:
        load = AutoModelForCausalLM.from_pretrained
        options = self._source() | {"dtype": _dtype(self.dtype)}
        if self.quantization is not None:
            options["quantization_config"] = quantization_config(
                self.quantization, options["dtype"]
            )
        attention = self.attn_implementation
        if attention is None:
            return cast(PreTrainedModel, loading(self.name_or_path, lambda: load(**options)))
        try:
            return cast(PreTrainedModel, load(**options, attn_implementation=attention))
        except (ValueError, ImportError) as error:
            # what else may be wrong shows without the setting
            model = loading(self.name_or_path, lambda: load(**options))
            raise InputError(
                f"attn_implementation {attention!r} does not work for {self.name_or_path}"
                f" ({first_line(error)}); give eager or sdpa, or leave it out for"
                f" {model.config._attn_implementation}"
            ) from error

    def _source(self) -> dict[str, Any]:
        folder, gguf_file = located(self.name_or_path, self.gguf_file, self.revision)
        source = {
            "pretrained_model_name_or_path": folder,
            "trust_remote_code": self.trust_remote_code,
        }
        return source | ({"gguf_file": gguf_file} if gguf_file else {})


def load_reward_model(
    name_or_path: str,
    *,
    revision: str | None = None,
    dtype: str = "float32",
    trust_remote_code: bool = False,
    fresh_head: bool = False,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return a reward model with one output, in evaluation mode, and its tokenizer.

    Args:
        name_or_path: Hub id, folder (also one of a mixture of experts), or ``.gguf`` file.
        revision: Branch, tag or commit on the hub.
        dtype: Of the weights.
        trust_remote_code: Whether to run code that comes with the model.
        fresh_head: Whether a head may be drawn at random where the model has none, to train it.

    Raises:
        InputError: If the model cannot be found, lacks weights, has several outputs, or has no
            head and ``fresh_head`` is off.
    """
    folder, gguf_file = located(name_or_path, None, revision)
    source: dict[str, Any] = {
        "pretrained_model_name_or_path": folder,
        "trust_remote_code": trust_remote_code,
    }
    if gguf_file is None:
        _refuse_several_outputs(name_or_path, source)
    else:
        source["gguf_file"] = gguf_file
    if is_moe_folder(folder):
        model = load_moe(folder, dtype=_dtype(dtype), trust_remote_code=trust_remote_code)
    else:
        model = _classifier(name_or_path, source | {"dtype": _dtype(dtype)}, fresh_head)
    tokenizer = loading(name_or_path, lambda: AutoTokenizer.from_pretrained(**source))
    if tokenizer.eos_token is None:
        # encoders close a text with this one
        tokenizer.eos_token = tokenizer.sep_token
    _ensure_padding(tokenizer)
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    return model.eval(), cast(PreTrainedTokenizerBase, tokenizer)


def _classifier(name: str, options: dict[str, Any], fresh_head: bool) -> PreTrainedModel:
    load = AutoModelForSequenceClassification.from_pretrained
    options |= {"num_labels": 1, "output_loading_info": True}
    model, info = loading(name, lambda: load(**options))
    missing = sorted(info["missing_keys"])
    # a fresh head has a name, what is in a layer has the layer's number
    in_layers = any(part.isdigit() for key in missing for part in key.split("."))
    if in_layers or (missing and not fresh_head):
        raise InputError(
            f"{name} is no reward model: it has no {missing};"
            " give a model trained for sequence classification"
        )
    _forget_gguf(model)
    return cast(PreTrainedModel, model)


def _refuse_several_outputs(name: str, source: dict[str, Any]) -> None:
    config = loading(name, lambda: AutoConfig.from_pretrained(**source))
    # a language model's configuration has the default of two labels, and no such head
    classifies = any("SequenceClassification" in kind for kind in config.architectures or ())
    if classifies and config.num_labels != 1:
        raise InputError(
            f"cannot load {name} (it has {config.num_labels} outputs, a reward model has one); give"
            " a folder made by save_pretrained with num_labels 1"
        )


def switch_off_dropout(model: nn.Module) -> None:
    """Set every dropout probability to 0, also those that only the configuration knows."""
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        # attention layers pass their own to the kernel
        for name, value in vars(module).items():
            if _names_dropout(name) and isinstance(value, float):
                setattr(module, name, 0.0)
    config = getattr(model, "config", None)
    for name, value in list(vars(config).items()) if config is not None else ():
        if _names_dropout(name) and isinstance(value, float):
            setattr(config, name, 0.0)


def _names_dropout(name: str) -> bool:
    return name.endswith(("dropout", "pdrop", "dropout_p", "dropout_prob"))


def _dtype(name: str) -> torch.dtype:
    if name not in _DTYPES:
        raise InputError(f"unknown dtype {name!r}; give one of {', '.join(_DTYPES)}")
    return _DTYPES[name]


def _ensure_padding(tokenizer: Any) -> None:
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token


def _forget_gguf(model: PreTrainedModel) -> None:
    # GGUF weights are plain tensors once loaded, but save_pretrained still refuses them
    quantization = getattr(model.config, "quantization_config", None)
    if quantization is None or "gguf" not in str(getattr(model, "quantization_method", "")).lower():
        return
    del model.config.quantization_config
    for name in ("hf_quantizer", "quantization_method", "is_quantized"):
        vars(model).pop(name, None)


def _checkpoint_activations(model: PreTrainedModel, name: str) -> None:
    # the older name goes with transformers 6
    enable = getattr(model, "activation_checkpointing_enable", None)
    try:
        # not reentrant: that needs inputs with a gradient, which frozen embeddings do not give
        (enable or model.gradient_checkpointing_enable)({"use_reentrant": False})
    except ValueError as error:
        raise InputError(
            f"{name} cannot checkpoint activations ({first_line(error)}); set"
            " gradient_checkpointing false"
        ) from error
