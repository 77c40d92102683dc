"""What is merged: checkpoints of any trainer, or a run's snapshots, memory-mapped."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
)

from tpmm_pl.commands.merging.vocabulary import refuse_other_tokens
from tpmm_pl.commands.merging.weights import mapped_weights
from tpmm_pl.merging import check_fits
from tpmm_pl.models.checkpoints import ADAPTER_CONFIG
from tpmm_pl.models.location import is_hub_id, loading, located
from tpmm_pl.models.moe_checkpoint import is_moe_folder
from tpmm_pl.trajectory import TrajectoryStore
from tpmm_pl.types import InputError, StateDict

_SHAPELESS = (
    "tie_word_embeddings", "num_attention_heads", "num_key_value_heads", "head_dim", "hidden_act",
    "hidden_activation", "activation_function", "rope_parameters", "rms_norm_eps", "layer_norm_eps",
    "layer_norm_epsilon", "sliding_window", "layer_types", "num_experts_per_tok", "num_labels",
)  # fmt: skip
"""Settings that change what weights compute, but no tensor's shape."""


class Source(NamedTuple):
    """A model to merge."""

    name: str
    """As a reader of the merge knows it: a hub id, a folder's name, a round."""
    state: StateDict
    """Its weights by the names in its files; tied ones once."""


class Sources(NamedTuple):
    """Models of one architecture and vocabulary."""

    models: list[Source]
    """K of them, oldest first."""
    folder: Path
    """Of the first, or of a run's export: configuration and tokenizer are taken from it."""
    config: Any
    skeleton: PreTrainedModel
    """The model on torch's ``meta`` device."""
    rounds: tuple[int, ...] | None
    """Of a run's snapshots."""

    @property
    def states(self) -> list[StateDict]:
        """Return the weights."""
        return [model.state for model in self.models]

    @property
    def classifies(self) -> bool:
        """Whether these are sequence classifiers and not language models."""
        return _classifies(self.config)


def read_sources(
    given: Sequence[str], rounds: Sequence[int] | None, *, trust_remote_code: bool
) -> Sources:
    """Open what is to be merged, and check that it goes together.

    Args:
        given: Folders or hub ids, two or more; or the folder of one run.
        rounds: Which snapshots of the run; ``None``: all.
        trust_remote_code: Whether to run code that comes with a model.

    Raises:
        InputError: If a source cannot be read, or is another model than the first, naming it.
    """
    if len(given) == 1 and (Path(given[0]) / "trajectory").is_dir():
        return _of_run(Path(given[0]), rounds, trust_remote_code)
    if rounds is not None:
        raise InputError(f"--rounds picks snapshots of one run, {given[0]} is none; leave it out")
    if len(given) < 2:
        raise InputError(
            f"{given[0]} alone is no merge; give two models or more, or one run's folder"
        )
    folders = [model_folder(name) for name in given]
    first = _opened(folders[0], given[0], trust_remote_code)
    for name, folder in zip(given[1:], folders[1:], strict=True):
        refuse_other_model(first.config, given[0], folder, name, trust_remote_code)
        refuse_other_tokens(folders[0], given[0], folder, name)
    models = [Source(known_as(n), f) for n, f in zip(given, _read(first, folders), strict=True)]
    refuse_unlike(models)
    return first._replace(models=models)


def read_base(name: str, sources: Sources, given: str, *, trust_remote_code: bool) -> Source:
    """Open the model that task vectors are differences to, as :func:`read_sources` does.

    Args:
        name: Folder or hub id.
        sources: What is merged.
        given: The first of these, as the user calls it.
        trust_remote_code: Whether to run code that comes with a model.
    """
    folder = model_folder(name)
    refuse_other_model(sources.config, given, folder, name, trust_remote_code)
    refuse_other_tokens(sources.folder, given, folder, name)
    base = Source(known_as(name), next(_read(sources, [folder])))
    refuse_unlike([sources.models[0], base])
    return base


def model_folder(name: str) -> Path:
    """Return the folder of a full model, fetched if it is on the hub.

    Raises:
        InputError: If there is none, or it holds something else.
    """
    folder, gguf_file = located(name, None, None)
    if gguf_file is not None:
        raise InputError(f"{name} is a GGUF file, whose weights are rounded; give the folder of it")
    if is_moe_folder(folder):
        raise InputError(f"{name} is a mixture of experts; make it dense by `tpmm consolidate`")
    if (folder / ADAPTER_CONFIG).is_file():
        raise InputError(
            f"{name} is an adapter, whose factors have no average; put it into its model first, by"
            " merge_and_unload of peft, and give the model's folder"
        )
    return folder


def known_as(name: str) -> str:
    """Return a hub id as it is, of a path the last part: folders are nobody else's concern."""
    return name if is_hub_id(name) else Path(name).expanduser().resolve().name


def refuse_other_model(
    config: Any, first: str, folder: Path, name: str, trust_remote_code: bool
) -> None:
    """Refuse a model of another architecture, or of settings that compute otherwise.

    Raises:
        InputError: Naming both models and what differs.
    """
    theirs = _config(folder, name, trust_remote_code)
    kinds = [(one.model_type, _classifies(one)) for one in (config, theirs)]
    if kinds[0] != kinds[1]:
        names = [(one.architectures or [one.model_type])[0] for one in (config, theirs)]
        raise InputError(
            f"{name} is a {names[1]}, {first} a {names[0]}; give models of one architecture"
        )
    ours, others = config.to_dict(), theirs.to_dict()
    for key in _SHAPELESS:
        if ours.get(key) != others.get(key):
            raise InputError(
                f"{name} has {key} {others.get(key)}, {first} has {ours.get(key)}; give models that"
                " were trained from the same one"
            )


def refuse_unlike(models: Sequence[Source]) -> None:
    """Refuse models whose tensors differ from the first one's in names, shapes or kind.

    Raises:
        InputError: Naming the model and the tensor.
    """
    first, *others = models
    for name, state in others:
        try:
            check_fits(state, first.state, name)
        except ValueError as error:
            raise InputError(
                f"{error} as in {first.name}; give models that were trained from the same one"
            ) from error
        for key, tensor in state.items():
            if tensor.is_floating_point() != first.state[key].is_floating_point():
                raise InputError(
                    f"{name}: tensor {key} is {tensor.dtype}, in {first.name} it is"
                    f" {first.state[key].dtype}; give models saved in one way"
                )


def _of_run(run: Path, rounds: Sequence[int] | None, trust_remote_code: bool) -> Sources:
    store = TrajectoryStore(run / "trajectory")
    chosen = tuple(r.round for r in store.rounds if r.snapshot) if rounds is None else tuple(rounds)
    if len(chosen) < 2:
        raise InputError(f"{run} gives the snapshots {list(chosen)}; a merge needs two or more")
    folder = run / "export" / "last"
    if (folder / ADAPTER_CONFIG).is_file() or any(
        "adapter" in Path(store.record(index).snapshot or "").parts for index in chosen
    ):
        raise InputError(
            f"{run} trains adapters, whose factors have no average; take its export/merged, which"
            " merges them as products"
        )
    if not folder.is_dir():
        if not store.model.get("name"):
            raise InputError(f"{run} has no export/last, whose configuration is needed; finish it")
        folder = model_folder(store.model["name"])
    opened = _opened(folder, str(folder), trust_remote_code)
    models = [Source(f"round {index}", store.source(index)) for index in chosen]
    # the model whose configuration is taken tells how weights are called in files
    refuse_unlike([Source(known_as(str(folder)), next(_read(opened, [folder]))), *models])
    return opened._replace(models=models, rounds=chosen)


def _opened(folder: Path, name: str, trust_remote_code: bool) -> Sources:
    config = _config(folder, name, trust_remote_code)
    classifier, language = AutoModelForSequenceClassification, AutoModelForCausalLM
    make: Any = (classifier if _classifies(config) else language).from_config
    with torch.device("meta"):
        made = loading(name, lambda: make(config, trust_remote_code=trust_remote_code))
    return Sources([], folder, config, made, None)


def _config(folder: Path, name: str, trust_remote_code: bool) -> Any:
    read = AutoConfig.from_pretrained
    config = loading(name, lambda: read(folder, trust_remote_code=trust_remote_code))
    if getattr(config, "quantization_config", None) is not None:
        raise InputError(f"{name} is quantised; give the model in bfloat16 or wider")
    return config


def _classifies(config: Any) -> bool:
    return any("SequenceClassification" in kind for kind in config.architectures or ())


def _read(first: Sources, folders: Sequence[Path]) -> Iterator[StateDict]:
    tied = getattr(first.skeleton, "all_tied_weights_keys", None) or {}
    for folder in folders:
        state = mapped_weights(folder)
        for name, twin in tied.items():
            # one that was trained apart from its twin is a weight of its own
            if name in state and twin in state and torch.equal(state[name], state[twin]):
                del state[name]
        yield state
