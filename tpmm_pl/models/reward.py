"""Reward models: one score a sequence, read at its last token."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import asdict
from itertools import takewhile
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tpmm_pl.data.packing import TOKEN_BUDGET, pack_rows, pad_tree
from tpmm_pl.files import write_text
from tpmm_pl.models.adapters import LoraSettings, with_adapters
from tpmm_pl.models.card import CARD
from tpmm_pl.models.export import export_model
from tpmm_pl.models.load import PretrainedPolicy, load_reward_model, switch_off_dropout
from tpmm_pl.models.moe_checkpoint import save_moe
from tpmm_pl.models.padding import separate_padding, use_padding
from tpmm_pl.models.tree_pass import (
    TreePass,
    note_refusal,
    unwrapped,
)
from tpmm_pl.modes import evaluating
from tpmm_pl.moe.convert import moe_layers, upcycle
from tpmm_pl.moe.routing import MoESettings
from tpmm_pl.types import InputError, PairBatch, Rewards, TokenTree


class RewardScorer:
    """Scores the rows of token trees; a decoder's head is applied to their last tokens only.

    Which token is the last says the tree, not the padding token, so a row that ends in the
    end-of-sequence token scores the same whether that token pads or not. Backbone and head are
    taken apart where that computes what the model's own forward does; encoders, which look at
    padding and pool in their own way, go through their own forward in padded rows.

    Args:
        model: A Hugging Face model for sequence classification with one output, or a
            ``PeftModel`` of one.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._parts = _backbone_and_head(model)
        self._pass = None if self._parts is None else TreePass(model, self._parts[0])
        if self._parts is None:
            note_refusal(model, "it is no decoder with a linear head")
        # what a router records is of one forward: all rows at once
        self._whole = bool(moe_layers(model))

    @property
    def packs(self) -> bool:
        """Whether every token of a tree goes through the model once, in the tree's order."""
        return self._pass is not None and self._pass.packs

    def __call__(self, batch: PairBatch) -> Rewards:
        """Return the scores of each pair's completions, ``(B,)``."""
        return Rewards(*self.rows(batch.tree).chunk(2))

    def rows(self, tree: TokenTree) -> Tensor:
        """Return the score of each row, ``(N,)`` float32."""
        if self._parts is None or self._pass is None:
            ids, mask = pad_tree(tree, _padding(self.model) or 0)
            scores = self.model(input_ids=ids, attention_mask=mask).logits
            return cast(Tensor, scores).squeeze(-1).float()
        if self._pass.packs:
            last = self._pass.packed(tree, tree.leaves)
        else:
            rows = torch.arange(len(tree.leaves), device=tree.leaves.device)
            last = self._pass.padded(tree, rows, tree.leaves, whole=self._whole)
        return cast(Tensor, self._parts[1](last)).squeeze(-1).float()

    def seen(self, tree: TokenTree) -> Tensor:
        """Return of how many rows each token is that goes through the model, padding of none.

        Returns:
            ``(1, T)`` int64 where the tree is packed, else ``(N, T)``.
        """
        return tree.multiplicity()[None] if self.packs else pad_tree(tree)[1]


@torch.no_grad()
def score_rows(
    scorer: RewardScorer, rows: Sequence[tuple[int, ...]], *, token_budget: int = TOKEN_BUDGET
) -> Tensor:
    """Score rows of tokens without gradients; what they begin with alike is computed once.

    Args:
        scorer: Its model's mode is left as it is.
        rows: M of them, none empty.
        token_budget: Tokens of a batch.

    Returns:
        ``(M,)`` float32 on the CPU.
    """
    device = next(scorer.model.parameters()).device
    scores = torch.empty(len(rows), dtype=torch.float32)
    for chosen in _cut(rows, token_budget):
        tree = pack_rows([((), rows[row]) for row in chosen]).to(device)
        scores[chosen] = scorer.rows(tree).cpu()
    return scores


def _cut(rows: Sequence[tuple[int, ...]], token_budget: int) -> list[list[int]]:
    batches: list[list[int]] = []
    tokens = token_budget
    # sorted, rows that begin alike are neighbours
    for row in sorted(range(len(rows)), key=lambda row: rows[row]):
        known = _common(rows[batches[-1][-1]], rows[row]) if batches else 0
        if tokens + len(rows[row]) - known > token_budget:
            batches.append([])
            tokens = known = 0
        batches[-1].append(row)
        tokens += len(rows[row]) - known
    return batches


def _common(a: tuple[int, ...], b: tuple[int, ...]) -> int:
    return sum(1 for _ in takewhile(lambda both: both[0] == both[1], zip(a, b, strict=False)))


class PretrainedReward:
    """A model of the Hugging Face family as a reward model to train.

    A causal language model gives its backbone and gets a fresh head. Padding gets a token that
    means nothing else, so that transformers, which looks for the last token that is no padding,
    scores an exported model as :class:`RewardScorer` does. Nothing is read before it is asked for.

    Args:
        name_or_path: Hub id, folder (also one of a mixture of experts written here), or
            ``.gguf`` file.
        revision: Branch, tag or commit on the hub.
        dtype: Of the weights: ``float32``, ``bfloat16``, ``float16`` or ``float64``.
        trust_remote_code: Whether to run code that comes with the model.
        chat_template: File with a Jinja template in place of the tokenizer's own.
        lora: Train adapters and the head instead of all weights.
        moe: Turn the model's feed-forward layers into mixtures of experts first.
        seed: Of a fresh head, adapters, and what ``moe`` draws.

    Raises:
        InputError: If ``dtype`` is unknown, or both ``lora`` and ``moe`` are given.
    """

    def __init__(
        self,
        name_or_path: str,
        *,
        revision: str | None = None,
        dtype: str = "float32",
        trust_remote_code: bool = False,
        chat_template: Path | None = None,
        lora: LoraSettings | None = None,
        moe: MoESettings | None = None,
        seed: int = 0,
    ) -> None:
        if lora is not None and moe is not None:
            raise InputError("lora and moe cannot go together: experts train whole; leave one out")
        self._source = PretrainedPolicy(
            name_or_path,
            revision=revision,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            chat_template=chat_template,
        )
        self.lora = lora
        self.moe = moe
        self.seed = seed

    def prepare(self) -> None:
        """Fetch the model from the hub, unless it is here.

        Raises:
            InputError: If there is no such folder or file, or the hub cannot be reached.
        """
        self._source.prepare()

    def load_model(self) -> PreTrainedModel:
        """Return the model in training mode with dropout off; a PeftModel with ``lora``.

        Raises:
            InputError: If the model cannot be found, has several outputs, or is a mixture of
                experts that ``lora`` or ``moe`` are asked of.
        """
        source = self._source
        # transformers and peft draw from the global generator what the files lack
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(self.seed)
            model, _ = load_reward_model(
                source.name_or_path,
                revision=source.revision,
                dtype=source.dtype,
                trust_remote_code=source.trust_remote_code,
                fresh_head=True,
            )
            self._refuse_second_conversion(model)
            use_padding(model, int(self.load_tokenizer().pad_token_id))
            switch_off_dropout(model)
            if self.lora is not None:
                heads = list(_heads(model))
                model = with_adapters(model, self.lora, task_type="SEQ_CLS", trained=heads)
        if self.moe is not None:
            upcycle(model, self.moe, generator=torch.Generator().manual_seed(self.seed))
        model.train()
        return model

    def load_tokenizer(self) -> PreTrainedTokenizerBase:
        """Return the tokenizer; it pads on the right, with a token that means nothing else.

        Raises:
            InputError: If the tokenizer or the template's file cannot be found.
        """
        tokenizer: Any = self._source.load_tokenizer()
        if tokenizer.eos_token is None:
            # encoders close a text with this one
            tokenizer.eos_token = tokenizer.sep_token
        separate_padding(tokenizer)
        tokenizer.padding_side = "right"
        return cast(PreTrainedTokenizerBase, tokenizer)

    def describe(self) -> dict[str, Any]:
        """Return plain JSON values that identify the model."""
        return self._source.describe() | {
            "lora": None if self.lora is None else asdict(self.lora),
            "moe": None if self.moe is None else asdict(self.moe),
            "seed": self.seed,
        }

    def _refuse_second_conversion(self, model: nn.Module) -> None:
        if (self.lora is None and self.moe is None) or not moe_layers(model):
            return
        asked = "moe" if self.lora is None else "lora"
        raise InputError(
            f"{self._source.name_or_path} is a mixture of experts already; leave out {asked}, or"
            " give a dense model"
        )


def export_reward_model(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    out: Path,
    card: str | None = None,
) -> None:
    """Write a folder that scores as the model does; the model itself is not changed.

    Dense models become plain ``from_pretrained`` folders, adapters merged into them; mixtures of
    experts become folders that :class:`PretrainedReward` reads.

    Args:
        model: The reward model.
        tokenizer: Its tokenizer.
        out: The folder to make or replace.
        card: Text of the model card.
    """
    if moe_layers(model):
        save_moe(cast(PreTrainedModel, model), tokenizer, out)
        if card is not None:
            write_text(out / CARD, card)
        return
    if isinstance(model, PeftModel):
        # of a copy: merged and unmerged again, the live weights would keep the rounding
        model = cast(PreTrainedModel, deepcopy(model).merge_and_unload())
    export_model(model, tokenizer, None, out, {} if card is None else {CARD: card})


def _heads(model: nn.Module) -> dict[str, nn.Module]:
    # what has weights beside the backbone
    backbone = getattr(model, "base_model", None)
    return {
        name: module
        for name, module in model.named_children()
        if module is not backbone and any(True for _ in module.parameters())
    }


def _backbone_and_head(model: nn.Module) -> tuple[nn.Module, nn.Module] | None:
    inner: Any = unwrapped(model)
    backbone, heads = getattr(inner, "base_model", None), list(_heads(inner).values())
    # a head that peft trains is wrapped
    linear = getattr(heads[0], "original_module", heads[0]) if len(heads) == 1 else None
    if backbone is None or backbone is inner or not isinstance(linear, nn.Linear):
        return None
    tokens = _probe(inner)
    other = torch.cat([tokens[:, :4], tokens[:, :4]], dim=1)
    with torch.no_grad(), evaluating(model):
        whole = inner(input_ids=tokens).logits
        hidden, changed = (backbone(input_ids=ids).last_hidden_state for ids in (tokens, other))
        parts = heads[0](hidden)[:, -1]
    tolerance = torch.finfo(hidden.dtype).eps ** 0.5
    causal = (hidden - changed)[:, :4].norm() <= tolerance * hidden[:, :4].norm()
    return (backbone, heads[0]) if torch.equal(whole, parts) and bool(causal) else None


def _probe(model: Any) -> Tensor:
    # (1, 8), without the padding token, which the model's own pooling skips
    embedding: Tensor = model.get_input_embeddings().weight
    tokens = torch.arange(8, device=embedding.device)[None] % (embedding.shape[0] - 1)
    padding = _padding(model)
    return tokens if padding is None else tokens + (tokens >= padding)


def _padding(model: nn.Module) -> int | None:
    config: Any = model.config
    padding: int | None = config.get_text_config().pad_token_id
    return padding
