"""One pass of a decoder over a token tree: packed, or in padded rows where it has to be."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel

from tpmm_pl.data.notices import say
from tpmm_pl.data.packing import pack_rows, pad_tree
from tpmm_pl.models.last_layer import last_feed_forward, only_at
from tpmm_pl.models.location import first_line
from tpmm_pl.models.tree_attention import TreeMask, attend_trees
from tpmm_pl.modes import evaluating
from tpmm_pl.moe.convert import moe_layers
from tpmm_pl.types import TokenTree

_refusals: WeakKeyDictionary[nn.Module, str | None] = WeakKeyDictionary()


class TreePass:
    """Runs a part of a decoder over a token tree.

    A decoder whose attention can look along a tree sees every token once. Which one can is tried
    out, once a model: a small tree must give what padded rows give. Others, as state-space models,
    whose state runs on from token to token, see padded rows; a line says so.

    Args:
        model: The decoder, of transformers or peft.
        part: What of it is run; its output has ``last_hidden_state`` or ``logits``.
    """

    def __init__(self, model: nn.Module, part: nn.Module) -> None:
        self.part = part
        self._has_head = part is model
        self._inner = inner = unwrapped(model)
        # processes that share weights call the blocks together, and as often
        self._at_once = any(isinstance(module, FSDPModule) for module in model.modules())
        # a mixture's router records all tokens
        self._last = None if moe_layers(inner) else last_feed_forward(inner)
        if inner not in _refusals:
            note_refusal(inner, self._refusal(model))
        self.packs = _refusals[inner] is None

    def packed(self, tree: TokenTree, tokens: Tensor) -> Tensor:
        """Return the output at some tokens, ``(M, ..)``; only if it ``packs``.

        Args:
            tree: The batch.
            tokens: ``(M,)`` indices into the tree.
        """
        # again: another attention may have been chosen since
        attend_trees(cast(PreTrainedModel, self._inner))
        # of four dimensions it is left alone; from none a decoder would make one of (T, T)
        mask = torch.zeros(1, 1, 1, 1, device=tree.tokens.device)
        options = {"logits_to_keep": tokens} if self._has_head else {}
        with self._narrowed(tokens):
            output = self.part(
                input_ids=tree.tokens[None], position_ids=tree.positions[None], tree=TreeMask(tree),
                attention_mask=mask, use_cache=False, **options,
            )  # fmt: skip
        values = _values(output)[0]
        # a backbone keeps no selection, nor does every language model
        return values[tokens] if len(values) == len(tree.tokens) else values

    def padded(
        self, tree: TokenTree, rows: Tensor, tokens: Tensor, *, whole: bool = False
    ) -> Tensor:
        """Return the output at some tokens of padded rows, ``(M, ..)``.

        Without an attention mask: padding is on the right, where a causal model does not look.

        Args:
            tree: The batch.
            rows: ``(M,)``; the row that each token is read in.
            tokens: ``(M,)`` indices into the tree.
            whole: Pass all rows at once, not in groups of similar length.
        """
        ids, mask = pad_tree(tree)
        places = torch.arange(len(tokens), device=ids.device)
        positions = tree.positions[tokens]
        at_once = whole or self._at_once
        groups = [(torch.arange(len(ids)), ids.shape[1])] if at_once else length_groups(mask)
        values, order = [], []
        for members, width in groups:
            place_in_group = ids.new_full((len(ids),), -1)
            place_in_group[members] = torch.arange(len(members), device=ids.device)
            chosen = place_in_group[rows] >= 0
            output = _values(self.part(input_ids=ids[members, :width], use_cache=False))
            values.append(output[place_in_group[rows[chosen]], positions[chosen]])
            order.append(places[chosen])
        return torch.cat(values)[torch.cat(order).argsort()]

    def _narrowed(self, tokens: Tensor) -> AbstractContextManager[None]:
        # a checkpointed block computes again in the backward pass, outside of this
        checkpointed = any(getattr(m, "gradient_checkpointing", False) for m in self.part.modules())
        if self._last is None or checkpointed:
            return nullcontext()
        return only_at(self._last, tokens)

    def _refusal(self, model: nn.Module) -> str | None:
        inner = unwrapped(model)
        if not isinstance(inner, PreTrainedModel) or not attend_trees(inner):
            return "its attention cannot be replaced"
        device = next(model.parameters()).device
        vocabulary = cast(Any, inner.get_input_embeddings()).weight.shape[0]
        tree = _probe(vocabulary).to(device)
        tokens = tree.states[tree.state_of]
        # autocast would round more than the result's dtype tells
        precise = torch.autocast(device.type, enabled=False)
        with evaluating(model), torch.no_grad(), precise:
            try:
                packed = self.packed(tree, tokens)
            except Exception as error:  # whatever a family's own code raises
                return first_line(error)
            padded = self.padded(tree, tree.row_of, tokens, whole=True)
        difference = float((packed - padded).norm() / padded.norm())
        # a wrong mask or position shows at once; rounding stays far below. Parts of a model, as
        # the softmax, have no more digits than float32, whatever its dtype
        rounding = max(torch.finfo(dtype).eps for dtype in (packed.dtype, torch.float32))
        if difference <= rounding**0.6:
            return None
        return f"a tree differs from rows by {difference:.0e}"


def note_refusal(model: nn.Module, reason: str | None) -> None:
    """Remember whether a model can be packed; where not, a line says why, once a model."""
    inner = unwrapped(model)
    if reason is not None and inner not in _refusals:
        name = type(inner).__name__
        say(f"{name} cannot be packed as a token tree ({reason}); its batches are padded")
    _refusals[inner] = reason


def length_groups(attention_mask: Tensor) -> list[tuple[Tensor, int]]:
    """Cut right-padded rows into groups of similar length, where that saves a tenth of the tokens.

    Args:
        attention_mask: ``(N, T)``.

    Returns:
        Row indices and the width of each group; every row is in one group.
    """
    lengths = attention_mask.sum(-1)
    whole = [(torch.arange(len(lengths), device=lengths.device), int(lengths.max()))]
    quarters = [(rows, int(lengths[rows].max())) for rows in lengths.argsort().chunk(4)]
    tokens = sum(len(rows) * width for rows, width in quarters)
    return quarters if tokens < 0.9 * len(lengths) * whole[0][1] else whole


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the model of transformers inside of one of peft; any other as it is."""
    get_base = getattr(model, "get_base_model", None)
    return model if get_base is None else cast(nn.Module, get_base())


def _values(output: Any) -> Tensor:
    hidden = getattr(output, "last_hidden_state", None)
    return cast(Tensor, output.logits if hidden is None else hidden)


def _probe(vocabulary: int) -> TokenTree:
    # two prompts of a common beginning, two answers each, one of them the beginning of another
    ids = [1 + token % (vocabulary - 1) for token in range(40)]
    first, second = (*ids[:5], *ids[5:9]), (*ids[:5], *ids[9:16])
    rows = [(first, ids[16:22]), (second, ids[22:26]), (first, ids[30:33]), (second, ids[22:24])]
    return pack_rows(rows)
