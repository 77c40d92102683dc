"""Models as Hugging Face folders, complete or absent."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tpmm_pl.files import replacing_folder
from tpmm_pl.types import StateDict


def export_model(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    state: StateDict | None,
    out: Path,
    notes: Mapping[str, str] | None = None,
) -> None:
    """Write model, tokenizer and generation settings as ``from_pretrained`` reads them.

    The folder is written beside and renamed; one that is there is replaced only then.

    Args:
        model: The model; of a PeftModel the active adapter is written, in a folder ``peft`` reads.
        tokenizer: Its tokenizer.
        state: Weights to write in place of the model's own, by the names of its ``state_dict``;
            cast to the model's dtypes. The model itself is not changed. Not for a PeftModel.
        out: The folder to make or replace.
        notes: Text files to add, by name, such as a model card.

    Raises:
        ValueError: If ``state`` lacks a weight, has an unknown one, or one of another shape.
    """
    weights = None if state is None else _weights(model, state)
    with replacing_folder(out) as beside, _valid_generation(model) as generation:
        if isinstance(model, PeftModel):
            _save_adapter(model, beside)
            if generation is not None:
                generation.save_pretrained(beside)
        else:
            model.save_pretrained(beside, state_dict=weights)
        tokenizer.save_pretrained(beside)
        for name, text in (notes or {}).items():
            (beside / name).write_text(text, encoding="utf-8")


@contextmanager
def _valid_generation(model: PreTrainedModel | PeftModel) -> Iterator[Any]:
    """Lend the model generation settings that can be saved; yield them, or ``None``."""
    inner: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    own = getattr(inner, "generation_config", None)
    if own is None:
        yield None
        return
    inner.generation_config = deepcopy(own)
    try:
        inner.generation_config.validate(strict=True)
    except ValueError:
        # a temperature or top_p in settings that do not sample: save_pretrained refuses them, and
        # who wrote them meant to sample
        inner.generation_config.do_sample = True
    try:
        yield inner.generation_config
    finally:
        inner.generation_config = own


def _weights(model: PreTrainedModel | PeftModel, state: StateDict) -> dict[str, Tensor]:
    if isinstance(model, PeftModel):
        raise ValueError("an adapter is exported as it is; put the state into the model first")
    own = model.state_dict()
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    if unknown := sorted(set(state) - set(own)):
        raise ValueError(f"{len(unknown)} weights are not the model's, as {unknown[0]}")
    if missing := sorted(set(own) - set(state) - tied):
        raise ValueError(f"{len(missing)} of the model's weights are missing, as {missing[0]}")
    for name, tensor in state.items():
        if tensor.shape != own[name].shape:
            shapes = f"{tuple(tensor.shape)}, the model's {tuple(own[name].shape)}"
            raise ValueError(f"{name} has the shape {shapes}")
    # tied weights are written once, under the name of their source
    return {
        name: tensor.detach().to(own[name].dtype)
        for name, tensor in state.items()
        if name not in tied
    }


def _save_adapter(model: PeftModel, folder: Path) -> None:
    name = model.active_adapter
    model.save_pretrained(str(folder), selected_adapters=[name])
    # peft puts every adapter but "default" into a folder of its name
    if (named := folder / name).is_dir():
        for path in named.iterdir():
            path.rename(folder / path.name)
        named.rmdir()
