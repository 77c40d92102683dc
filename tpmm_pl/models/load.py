"""Models from the hub, a folder or a GGUF file."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from huggingface_hub import snapshot_download
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from tpmm_pl.models.moe_checkpoint import is_moe_folder, load_moe
from tpmm_pl.types import InputError

_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}
_SMALL = ["*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken", "*.py"]
_NOT_THESE = ["original/*", "consolidated*"]

Loaded = TypeVar("Loaded")


@dataclass(frozen=True)
class LoraSettings:
    """Low-rank adapters on a frozen model (Hu et al. 2021)."""

    r: int = 16
    """Rank."""
    alpha: int = 32
    """The update is scaled by ``alpha / r``."""
    target_modules: str | list[str] = "all-linear"
    """Names of the adapted layers; ``all-linear``: every linear layer but the head."""
    dropout: float = 0.0
    """Above 0 a fresh policy no longer computes what its reference does while it trains."""


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
        chat_template: File with a Jinja template in place of the tokenizer's own.

    Raises:
        InputError: If ``dtype`` is unknown.
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
        chat_template: Path | None = None,
    ) -> None:
        self.name_or_path = name_or_path
        self.gguf_file = gguf_file
        self.revision = revision
        self.dtype = dtype
        self.attn_implementation = attn_implementation
        self.trust_remote_code = trust_remote_code
        self.lora = lora
        self.chat_template = chat_template
        _dtype(dtype)

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
        options = self._source() | {"dtype": _dtype(self.dtype)}
        if self.attn_implementation is not None:
            options["attn_implementation"] = self.attn_implementation
        load = AutoModelForCausalLM.from_pretrained
        model = cast(PreTrainedModel, _loading(self.name_or_path, lambda: load(**options)))
        _forget_quantization(model)
        switch_off_dropout(model)
        if not Path(self.name_or_path).exists():
            # an adapter's folder names its base model by this: the hub's id, not a cache's path
            model.config._name_or_path = self.name_or_path
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
        tokenizer = _loading(self.name_or_path, lambda: load(**options))
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
        }

    def _source(self) -> dict[str, Any]:
        folder, gguf_file = _located(self.name_or_path, self.gguf_file, self.revision)
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
    folder, gguf_file = _located(name_or_path, None, revision)
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
    tokenizer = _loading(name_or_path, lambda: AutoTokenizer.from_pretrained(**source))
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
    model, info = _loading(name, lambda: load(**options))
    missing = sorted(info["missing_keys"])
    # a fresh head has a name, what is in a layer has the layer's number
    in_layers = any(part.isdigit() for key in missing for part in key.split("."))
    if in_layers or (missing and not fresh_head):
        raise InputError(
            f"{name} is no reward model: it has no {missing};"
            " give a model trained for sequence classification"
        )
    _forget_quantization(model)
    return cast(PreTrainedModel, model)


def _refuse_several_outputs(name: str, source: dict[str, Any]) -> None:
    config = _loading(name, lambda: AutoConfig.from_pretrained(**source))
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


def _located(name: str, gguf_file: str | None, revision: str | None) -> tuple[Path, str | None]:
    path = Path(name).expanduser()
    direct = path.suffix == ".gguf" and gguf_file is None
    if direct:
        path, gguf_file = path.parent, path.name
    if direct or path.is_dir():
        if gguf_file is not None and not (path / gguf_file).is_file():
            raise InputError(f"no file {path / gguf_file}; check the path")
        return path, gguf_file
    # a hub id is `name` or `owner/name`
    if path.is_absolute() or name.startswith((".", "~")) or len(path.parts) > 2:
        raise InputError(f"no model folder {path}; check the path, or give a hub id")
    if path.exists():
        raise InputError(f"{path} is a file, not a model; give its folder, or a .gguf file")
    return _fetched(name, gguf_file, revision), gguf_file


def _fetched(name: str, gguf_file: str | None, revision: str | None) -> Path:
    # fetched as a whole and then loaded as a folder: from_pretrained would ask the hub for every
    # file again, and retry each for half a minute where there is no network
    def fetch(weights: str) -> Path:
        patterns = [*_SMALL, weights]
        folder = snapshot_download(
            name, revision=revision, allow_patterns=patterns, ignore_patterns=_NOT_THESE
        )
        return Path(folder)

    try:
        folder = fetch(gguf_file or "*.safetensors")
        if gguf_file is None and not any(folder.glob("*.safetensors")):
            folder = fetch("*.bin")
    except (OSError, ValueError) as error:
        raise InputError(
            f"no folder {name} here, and the Hugging Face hub does not give it"
            f" ({_first_line(error)}); check the name and the network, or give a folder"
        ) from error
    return folder


def _loading(name: str, load: Callable[[], Loaded]) -> Loaded:
    try:
        return load()
    except torch.OutOfMemoryError:
        raise
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        raise InputError(
            f"cannot load {name} ({_first_line(error)}); give a folder made by save_pretrained"
        ) from error


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0].rstrip(".:") if lines else type(error).__name__


def _dtype(name: str) -> torch.dtype:
    if name not in _DTYPES:
        raise InputError(f"unknown dtype {name!r}; give one of {', '.join(_DTYPES)}")
    return _DTYPES[name]


def _ensure_padding(tokenizer: Any) -> None:
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token


def _forget_quantization(model: PreTrainedModel) -> None:
    # GGUF weights are plain tensors once loaded, but save_pretrained still refuses them
    quantization = getattr(model.config, "quantization_config", None)
    if quantization is None or "gguf" not in str(getattr(model, "quantization_method", "")).lower():
        return
    del model.config.quantization_config
    for name in ("hf_quantizer", "quantization_method", "is_quantized"):
        vars(model).pop(name, None)


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
        task_type=task_type,
        modules_to_save=list(trained) or None,
    )
    return cast(PreTrainedModel, get_peft_model(model, config))
