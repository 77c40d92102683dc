"""Coefficients of a merge learned on held-out pairs."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.fabric import Fabric
from torch import nn

from tpmm_pl.commands.merging.sources import Sources
from tpmm_pl.data.batching import fuse_loader, micro_batches
from tpmm_pl.data.cache import Encoding
from tpmm_pl.data.notices import say
from tpmm_pl.data.prepare import Preparation
from tpmm_pl.data.rows.sources import as_sources
from tpmm_pl.data.table import PairTable, with_reference
from tpmm_pl.fabric import fit_with_fabric
from tpmm_pl.merging import assign_groups
from tpmm_pl.models.load import PretrainedPolicy, load_reward_model
from tpmm_pl.models.reward import RewardScorer
from tpmm_pl.models.scoring import PairScorer, score_pairs
from tpmm_pl.modules.consolidation import ranking
from tpmm_pl.modules.fusion import FusionSettings, FusionWeights, fit_warning
from tpmm_pl.streaming import StreamedMerge
from tpmm_pl.types import InputError, PairBatch, Recipe


class Learned(NamedTuple):
    """What a fit of coefficients gave."""

    recipe: Recipe
    group_of: dict[str, int]
    """The row of every weight; a buffer has none."""
    loss_uniform: float
    """Mean over all pairs in nats, of the plain average."""
    loss: float
    """The same of the learned merge."""
    steps: int

    def warning(self) -> str | None:
        """Return a sentence if the coefficients did not move or collapsed."""
        return fit_warning(self.recipe, what="source")


def learn(
    sources: Sources,
    pairs: Path,
    settings: FusionSettings,
    *,
    dtype: str,
    max_length: int,
    seed: int,
    trust_remote_code: bool,
) -> Learned:
    """Learn coefficients: of language models by the DPO loss against the first source.

    Reward models are compared by their scores (Bradley and Terry). One model is in memory.

    Args:
        sources: What is merged.
        pairs: File of preferences that no source was trained on.
        settings: Groups and the numbers of the fit.
        dtype: Of the model in memory.
        max_length: Tokens of prompt and completion together.
        seed: Of the order of pairs.
        trust_remote_code: Whether to run code that comes with the model.

    Raises:
        InputError: If the file is at fault, or the loaded model has other weights than its files.
    """
    fabric = Fabric(accelerator="auto", devices=1)
    model, tokenizer = _loaded(sources, dtype, trust_remote_code)
    table = _read_pairs(pairs, tokenizer, max_length, whole_turns=sources.classifies)
    fabric.to_device(model)
    parameters = dict(model.named_parameters())
    if odd := sorted(set(parameters) - set(sources.states[0])):
        raise InputError(
            f"the {type(model).__name__} has a weight {odd[0]} that its files call otherwise;"
            " choose a --method that needs no loaded model"
        )
    groups, group_of = assign_groups(parameters, settings.grouping)
    merge = StreamedMerge(parameters, sources.states, group_of, len(groups))
    count = len(sources.models)
    merge.write(torch.eye(count)[:1].expand(len(groups), count))
    if not sources.classifies:
        table = with_reference(table, score_pairs(model, table))
    module = FusionWeights(settings)
    scorer = RewardScorer(model) if sources.classifies else PairScorer(model)
    if sources.classifies:
        module.objective = ranking
    module.attach(merge, groups, scorer, tuple(range(count)), torch.zeros(len(groups), count))
    batches = [fabric.to_device(batch) for batch in micro_batches(table)]
    before = _loss(module, batches)
    generator = torch.Generator().manual_seed(seed)
    loader = fuse_loader(
        table, batch_size=settings.batch_size, steps=settings.steps, generator=generator
    )
    fit_with_fabric(fabric, module, loader, title="learning coefficients")
    after = _loss(module, batches)
    return Learned(module.recipe(), group_of, before, after, len(module.losses))


def _loaded(sources: Sources, dtype: str, trust_remote_code: bool) -> tuple[nn.Module, Any]:
    name = str(sources.folder)
    if sources.classifies:
        return load_reward_model(name, dtype=dtype, trust_remote_code=trust_remote_code)
    source = PretrainedPolicy(name, dtype=dtype, trust_remote_code=trust_remote_code)
    return source.load_model(), source.load_tokenizer()


def _read_pairs(path: Path, tokenizer: Any, max_length: int, *, whole_turns: bool) -> PairTable:
    prepare = Preparation(tokenizer, Encoding.of(max_length, None, whole_turns=whole_turns))
    table = prepare.held_out(as_sources(path))
    say(prepare.report.table())
    return table


@torch.no_grad()
def _loss(module: FusionWeights, batches: list[PairBatch]) -> float:
    module.merge.write(module.coefficients())
    beta = module.settings.beta
    losses = [module.objective(module.scorer(batch), batch, beta) for batch in batches]
    return float(torch.cat(losses).mean())
