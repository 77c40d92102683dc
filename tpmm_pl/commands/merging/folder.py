"""The merged model as a Hugging Face folder, computed and written tensor by tensor."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor
from tqdm.auto import tqdm

from tpmm_pl.commands.merging.methods import Merge
from tpmm_pl.commands.merging.sources import Sources
from tpmm_pl.commands.merging.vocabulary import TOKENIZER
from tpmm_pl.files import replacing_folder
from tpmm_pl.models.card import CARD
from tpmm_pl.models.location import is_hub_id
from tpmm_pl.tensor_files import LARGEST_FILE, WrittenFile, write_tensors
from tpmm_pl.types import StateDict

_BESIDE = (*TOKENIZER, "generation_config.json", "*.py")
"""Files of a model that are neither weights nor its configuration."""


class PendingTensor(Tensor):
    """Shape and type of a tensor, on ``meta``, whose numbers are made when it is detached."""

    make: Callable[[], Tensor]

    def detach(self) -> Tensor:
        """Return the tensor."""
        return self.make()


class MergedTensors(Mapping[str, Tensor]):
    """The merge of K states; nothing is computed before a tensor is taken.

    Args:
        states: By the same names, oldest first.
        merge: Fills a tensor of floats; others are the last state's.
        dtype: Of floats; ``None``: as in the first state.
    """

    def __init__(
        self, states: Sequence[StateDict], merge: Merge, dtype: torch.dtype | None
    ) -> None:
        self._states, self._merge, self._dtype = states, merge, dtype
        self._progress = tqdm(total=len(states[0]), desc="merging", leave=False, disable=None)

    def __getitem__(self, name: str) -> Tensor:
        first = self._states[0][name]
        floats = first.is_floating_point()
        dtype = (self._dtype or first.dtype) if floats else self._states[-1][name].dtype
        pending = torch.empty(first.shape, dtype=dtype, device="meta").as_subclass(PendingTensor)
        pending.make = partial(self._made, name, dtype)
        return pending

    def __iter__(self) -> Iterator[str]:
        return iter(self._states[0])

    def __len__(self) -> int:
        return len(self._states[0])

    def _made(self, name: str, dtype: torch.dtype) -> Tensor:
        self._progress.update()
        tensors = [state[name] for state in self._states]
        if not tensors[-1].is_floating_point():
            return tensors[-1]
        out = torch.empty(tensors[0].shape, dtype=dtype)
        self._merge(name, tensors, out)
        return out


def write_folder(
    out: Path,
    sources: Sources,
    merged: Mapping[str, Tensor],
    recipe: Mapping[str, Any],
    *,
    largest: int = LARGEST_FILE,
) -> WrittenFile:
    """Write a merged model with all that belongs to it; complete or absent.

    Args:
        out: The folder to make or replace.
        sources: Configuration, generation settings and code are the first one's, or those of the
            run's export, as is the tokenizer.
        merged: Its weights, as :class:`MergedTensors`.
        recipe: How it was made, plain JSON values.
        largest: Bytes of tensors in one file.

    Returns:
        The file of weights, or the index of several, and its hash.
    """
    with replacing_folder(out) as beside:
        written = write_tensors(beside / "model.safetensors", merged, largest=largest)
        config = json.loads((sources.folder / "config.json").read_text(encoding="utf-8"))
        config.setdefault("architectures", [type(sources.skeleton).__name__])
        name = "torch_dtype" if "torch_dtype" in config else "dtype"
        config[name] = recipe["dtype"]
        _write_json(beside / "config.json", config)
        for path in chain.from_iterable(sources.folder.glob(pattern) for pattern in _BESIDE):
            if path.is_file():
                shutil.copyfile(path, beside / path.name)
        _write_json(beside / "recipe.json", {**recipe, "sha256": written.sha256})
        (beside / CARD).write_text(_card(recipe, sources), encoding="utf-8")
    return WrittenFile(out / written.path.name, written.sha256)


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _card(recipe: Mapping[str, Any], sources: Sources) -> str:
    names: list[str] = recipe["sources"]
    bases = [name for name in dict.fromkeys(names) if is_hub_id(name) and "/" in name]
    header = {
        "library_name": "transformers",
        "pipeline_tag": "text-classification" if sources.classifies else "text-generation",
        "tags": ["tpmm_pl", "merge"],
        **({"base_model": bases, "base_model_relation": "merge"} if bases else {}),
    }
    settings = {key: value for key, value in recipe.items() if key not in ("sources", "groups")}
    return (
        f"---\n{yaml.safe_dump(header, sort_keys=False, allow_unicode=True)}---\n\n"
        f"# A merge of {len(names)} models\n\nMade by `tpmm merge`, of, in this order:\n\n"
        + "".join(f"- `{name}`\n" for name in names)
        + f"\n```yaml\n{yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)}```\n"
    )
