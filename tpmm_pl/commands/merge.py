"""``tpmm merge``: checkpoints of any trainer, or a run's snapshots, become one model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch

from tpmm_pl.commands.merging.folder import MergedTensors, write_folder
from tpmm_pl.commands.merging.plans import METHODS, Asked
from tpmm_pl.commands.merging.sources import Sources, read_sources
from tpmm_pl.commands.output import refuse_existing, report
from tpmm_pl.modules.fusion import FusionSettings
from tpmm_pl.types import InputError

_OF_METHODS = {
    "weights": ("linear", "ties", "dare"),
    "normalize": ("linear",),
    "pairs": ("learned",),
    "base": ("ties", "dare"),
}
"""Settings that mean something to some methods only."""

Number = TypeVar("Number", int, float)


def merge_models(
    sources: list[str],
    out: Path,
    method: Literal["linear", "learned", "ema", "slerp", "ties", "dare"] = "linear",
    weights: str | None = None,
    normalize: bool = False,
    pairs: Path | None = None,
    grouping: Literal["model", "layer", "block", "tensor"] = "model",
    steps: int = 15,
    batch_size: int = 64,
    lr: float = 0.3,
    beta: float = 0.1,
    max_length: int = 1024,
    alpha: float = 0.6,
    t: float = 0.5,
    base: str | None = None,
    density: float = 0.2,
    rounds: str | None = None,
    dtype: Literal["float32", "bfloat16", "float16", "float64"] | None = None,
    seed: int = 0,
    trust_remote_code: bool = False,
    overwrite: bool = False,
    json: bool = False,
) -> None:
    """Merge models of one architecture, tensor by tensor, into a folder that any tool loads.

    Args:
        sources: Folders or hub ids of causal language models or sequence classifiers of any
            trainer, or the folder of one run, whose snapshots are merged.
        out: Folder to write.
        method: `linear`; `learned` on `--pairs`; `ema`, oldest source first; `slerp` of two
            sources; `ties` or `dare`, of task vectors.
        weights: Of `linear`, a number a source, as `0.2,0.3,0.5`, used as given; the plain average
            by default. Of `ties` and `dare`, a number a task vector; 1 and 1/K by default.
        normalize: Divide by the sum of the weights.
        pairs: Held-out preference pairs that no source was trained on.
        grouping: Which weights share learned coefficients.
        steps: Of learning, at most.
        batch_size: Pairs a step of learning.
        lr: Of learning.
        beta: Of the DPO loss against the first source, by which coefficients are learned.
        max_length: Tokens of prompt and completion together.
        alpha: Weight of each newer source in `ema`.
        t: Where on the arc of `slerp`: 0 is the first source, 1 the second.
        base: Hub id or folder that task vectors are differences to; the first source by default.
        density: Share of a task vector's entries that count.
        rounds: Which snapshots of a run, as `0,3,5`; all by default.
        dtype: Of the weights; the first source's by default.
        seed: Of the order of pairs, and of the entries that `dare` draws.
        trust_remote_code: Run code that comes with the models.
        overwrite: Replace the folder if it exists.
        json: Print one JSON object and nothing else.

    Raises:
        InputError: If sources cannot be read or do not go together, or settings do not.
    """
    given = {"weights": weights, "normalize": normalize, "pairs": pairs, "base": base}
    for name, value in given.items():
        if value not in (None, False) and method not in _OF_METHODS[name]:
            raise InputError(f"--{name} goes with {' and '.join(_OF_METHODS[name])}, not {method}")
    refuse_existing(out, overwrite=overwrite)
    chosen = None if rounds is None else _numbers(rounds, int, "rounds", "0,3,5")
    opened = read_sources(sources, chosen, trust_remote_code=trust_remote_code)
    asked = Asked(
        first=sources[0],
        dtype=getattr(torch, dtype) if dtype else _main_dtype(opened),
        weights=None if weights is None else _numbers(weights, float, "weights", "0.2,0.3,0.5"),
        normalize=normalize,
        pairs=pairs,
        fusion=FusionSettings(
            beta=beta, grouping=grouping, lr=lr, steps=steps, batch_size=batch_size
        ),
        max_length=max_length,
        alpha=alpha,
        t=t,
        base=base,
        density=density,
        seed=seed,
        trust_remote_code=trust_remote_code,
    )
    plan = METHODS[method](opened, asked)
    recipe: dict[str, Any] = {
        "method": method,
        "sources": [model.name for model in opened.models],
        **({} if opened.rounds is None else {"rounds": list(opened.rounds)}),
        **plan.facts,
        "dtype": str(asked.dtype).removeprefix("torch."),
    }
    merged = MergedTensors(plan.states, plan.merge, asked.dtype if dtype else None)
    written = write_folder(out, opened, merged, recipe)
    found = {"out": str(out), **recipe, "sha256": written.sha256}
    report("\n".join(_sentences(found, plan.sentences)), found, json=json)


def _numbers(
    text: str, kind: Callable[[str], Number], name: str, example: str
) -> tuple[Number, ...]:
    try:
        return tuple(kind(part) for part in text.split(","))
    except ValueError:
        raise InputError(f"--{name} is {text!r}; give numbers as {example}") from None


def _main_dtype(sources: Sources) -> torch.dtype:
    """Return the type that most of the first source's numbers have."""
    sizes: dict[torch.dtype, int] = {}
    for tensor in sources.states[0].values():
        if tensor.is_floating_point():
            sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.numel()
    return max(sizes, key=lambda dtype: sizes[dtype])


def _sentences(found: dict[str, Any], more: Sequence[str]) -> list[str]:
    lines = list(more)
    if "coefficients" in found:
        names = found.get("groups", ["all weights"])
        lines.append("coefficients of " + ", ".join(found["sources"]))
        lines += [
            f"  {name}: " + " ".join(f"{c:.4f}" for c in row)
            for name, row in zip(names, found["coefficients"], strict=True)
        ]
    lines.append(
        f"{found['out']}: {found['method']} merge of {len(found['sources'])} models, "
        f"{found['dtype']}"
    )
    return lines
