"""``tpmm consolidate``: a mixture of experts becomes the dense reward model it once was."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.fabric import Fabric
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tpmm_pl.commands.output import refuse_existing, report
from tpmm_pl.data.batching import fuse_loader, micro_batches
from tpmm_pl.data.packing import pack_rows, pad_tree
from tpmm_pl.data.rewards import read_reward_pairs
from tpmm_pl.data.table import join
from tpmm_pl.fabric import fit_with_fabric
from tpmm_pl.models.load import load_reward_model
from tpmm_pl.models.moe_checkpoint import is_moe_folder
from tpmm_pl.models.plain import plain_scores
from tpmm_pl.models.reward import RewardScorer, export_reward_model
from tpmm_pl.modules.consolidation import ExpertFusion, Start, mean_gates
from tpmm_pl.types import InputError, Pair, PairBatch, RunError, TokenTree

TOLERANCE = 1e-5
"""Largest difference allowed to the scores of plain transformers, relative above 1, in float32."""


def consolidate_model(
    directory: Path,
    out: Path,
    pairs: Path | None = None,
    coefficients: Literal["uniform", "routing", "learned"] | None = None,
    shared_coefficient: float = 0.5,
    start: Start = "uniform",
    steps: int = 50,
    batch_size: int = 32,
    lr: float = 0.1,
    max_length: int = 1024,
    seed: int = 0,
    dtype: str = "float32",
    overwrite: bool = False,
    json: bool = False,
) -> None:
    """Merge the experts of every layer into one dense layer and drop the router.

    Args:
        directory: Mixture of experts, as `tpmm upcycle` and the training of one write it.
        out: Folder to write; any tool loads it as a reward model of the original architecture.
        pairs: Held-out preference pairs, JSONL, that no model here was trained on.
        coefficients: Of the routed experts: `uniform` (default without pairs), their mean gates
            on the pairs (`routing`), or `learned` on the pairs (default with pairs).
        shared_coefficient: Weight of the shared expert, in [0, 1].
        start: Where learning starts.
        steps: Of learning, at most.
        batch_size: Pairs a step of learning.
        lr: Of learning.
        max_length: Tokens of prompt and completion together.
        seed: Of the order of pairs.
        dtype: Of the weights.
        overwrite: Replace the folder if it exists.
        json: Print one JSON object and nothing else.

    Raises:
        InputError: If the input is no mixture of experts, pairs are missing, or the folder exists.
        RunError: If plain transformers gives other scores for what was written.
    """
    way = coefficients or ("uniform" if pairs is None else "learned")
    if way != "uniform" and pairs is None:
        raise InputError(f"--coefficients {way} needs pairs to look at; give --pairs FILE")
    if steps < 1 or batch_size < 1:
        raise InputError(f"--steps {steps} and --batch_size {batch_size} must be at least 1")
    refuse_existing(out, overwrite=overwrite)
    if not is_moe_folder(directory):
        raise InputError(
            f"{directory} is no mixture of experts made here (it has no moe.json); "
            "make one by `tpmm upcycle`"
        )
    fusion = ExpertFusion(shared_coefficient=shared_coefficient, start=start, lr=lr)
    fabric = Fabric(accelerator="auto", devices=1)
    model, tokenizer = load_reward_model(str(directory), dtype=dtype)
    fabric.to_device(model)
    known = join()
    if pairs is not None:
        known = read_reward_pairs(pairs, tokenizer, max_length=max_length)
    if pairs is not None and not known:
        raise InputError(f"{pairs} leaves no pair at --max_length {max_length}; give others")
    batches = fabric.to_device(micro_batches(known)) if known else []
    found: dict[str, Any] = {"out": str(out), "coefficients": way}
    if known:
        found["accuracy_experts"] = accuracy(model, batches)
    gates = None
    if way == "routing" or (way == "learned" and start == "routing"):
        gates = mean_gates(model, batches)
    fusion.bind_experts(model, gates)
    if way == "learned":
        generator = torch.Generator().manual_seed(seed)
        loader = fuse_loader(known, batch_size=batch_size, steps=steps, generator=generator)
        found |= _learned(fusion, fabric, loader, batches)
    if known:
        found["accuracy_dense"] = accuracy(model, batches)
    found["max_difference"] = written_and_read(model.cpu(), tokenizer, known, out, dtype)
    found["rows"] = fusion.coefficients().tolist()
    report(_sentences(found, fusion), found, json=json)


def _learned(
    fusion: ExpertFusion,
    fabric: Fabric,
    loader: Iterable[list[PairBatch]],
    batches: Sequence[PairBatch],
) -> dict[str, float]:
    before = _loss(fusion, batches)
    fit_with_fabric(fabric, fusion, loader, title="learning coefficients")
    fusion.merge.write(fusion.coefficients())
    return {"loss_start": before, "loss": _loss(fusion, batches), "steps": len(fusion.losses)}


@torch.no_grad()
def accuracy(model: torch.nn.Module, batches: Sequence[PairBatch]) -> float:
    """Return the share of pairs whose chosen completion scores higher."""
    scorer = RewardScorer(model)
    rewards = [scorer(batch) for batch in batches]
    return float(torch.cat([r.chosen > r.rejected for r in rewards]).float().mean())


def probe_rows(tokenizer: PreTrainedTokenizerBase, pairs: Sequence[Pair]) -> TokenTree:
    """Return rows to score.

    Args:
        tokenizer: The reward model's.
        pairs: The first are taken; without pairs, rows of the vocabulary's tokens.
    """
    rows = [pair.prompt_ids + pair.chosen_ids for pair in pairs[:8]]
    if not rows:
        usable = sorted(set(range(min(len(tokenizer), 512))) - set(tokenizer.all_special_ids))
        rows = [tuple(usable[length : 3 * length]) for length in (2, 5, 9)]
    return pack_rows([((), row) for row in rows])


@torch.no_grad()
def written_and_read(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[Pair],
    out: Path,
    dtype: str,
) -> float:
    """Write a dense model; return its scores' largest difference to what is read back.

    Args:
        model: To write, on the CPU.
        tokenizer: Its tokenizer.
        pairs: To compare on.
        out: The folder.
        dtype: Of the weights.

    Raises:
        InputError: If the model's scores are not finite; nothing is written then.
        RunError: If plain transformers cannot read the folder, or scores otherwise.
    """
    tree = probe_rows(tokenizer, pairs)
    ours = RewardScorer(model).rows(tree)
    if not ours.isfinite().all():
        raise InputError("the consolidated model's scores are not finite; check the experts")
    export_reward_model(model, tokenizer, out)
    theirs = plain_scores(out, *pad_tree(tree, int(tokenizer.pad_token_id)), dtype=dtype)
    found = float((ours - theirs).abs().max())
    if dtype == "float32" and not found <= TOLERANCE * max(1.0, float(ours.abs().max())):
        raise RunError(
            f"plain transformers scores {out} otherwise by {found:.1e}; please report the model's "
            "architecture"
        )
    return found


@torch.no_grad()
def _loss(fusion: ExpertFusion, batches: Sequence[PairBatch]) -> float:
    losses: list[Tensor] = [fusion.objective(fusion.scorer(b), b, 1.0) for b in batches]
    return float(torch.cat(losses).mean())


def _sentences(found: dict[str, Any], fusion: ExpertFusion) -> str:
    rows = fusion.coefficients()
    lines = [
        f"layer {number:>2}: " + " ".join(f"{c:.3f}" for c in row.tolist())
        for number, row in enumerate(rows)
    ]
    lines.insert(0, f"coefficients ({found['coefficients']}), the shared expert's first")
    if "loss" in found:
        lines.append(
            f"loss on the pairs {found['loss_start']:.4f} -> {found['loss']:.4f} nats "
            f"in {found['steps']} steps"
        )
        if (sentence := fusion.warning()) is not None:
            lines.append(f"warning: {sentence}")
        if found["loss_start"] - found["loss"] < 1e-4 * found["loss_start"]:
            lines.append("warning: the loss hardly fell; these coefficients say little")
    if "accuracy_dense" in found:
        lines.append(
            f"accuracy on the pairs: experts {found['accuracy_experts']:.3f}, "
            f"dense {found['accuracy_dense']:.3f}"
        )
    lines.append(
        f"{found['out']}: plain transformers scores it within {found['max_difference']:.1e}"
    )
    return "\n".join(lines)
