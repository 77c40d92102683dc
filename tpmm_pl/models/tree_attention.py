"""Attention over a token tree: a token looks at its ancestors and at itself.

A decoder of transformers that takes an attention function takes this one unchanged: the tree goes
into its forward pass as the argument ``tree`` and reaches every layer. On CUDA it is
FlexAttention with a block mask; elsewhere one call of scaled dot-product attention a segment.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from importlib import import_module
from itertools import pairwise
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.flex_attention import flex_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from tpmm_pl.types import TokenTree

_PREFIX = "token_tree_on_"
_PLAIN_LAYERS = {"full_attention", "sliding_attention"}

Span = tuple[int, int]
"""Tokens of a tree, from the first to behind the last."""


SEGMENT = 128
"""Tokens that share a call of attention although they branch: a call costs as much as they do."""


@dataclass(frozen=True)
class Segment:
    """Consecutive tokens whose attention is one call: a chain of children, or several short ones.

    Args:
        span: The tokens.
        context: All ancestors of the first of them; others before it are none of any.
    """

    span: Span
    context: tuple[Span, ...]

    @property
    def seen(self) -> tuple[Span, ...]:
        """All that any of its tokens sees, in order."""
        return (*self.context, self.span)


@dataclass
class TreeMask:
    """Who sees whom in a token tree, in the forms that kernels take; made once a batch.

    Args:
        tree: The batch's tokens.
    """

    tree: TokenTree
    _masks: dict[Any, Tensor | None] = field(default_factory=dict)
    _blocks: dict[int | None, BlockMask] = field(default_factory=dict)

    @cached_property
    def segments(self) -> list[Segment]:
        """The tree in segments; asked for where attention runs one by one."""
        return segments(self.tree.ends.cpu().numpy(), SEGMENT)

    @cached_property
    def edges(self) -> list[int]:
        """Where the row is cut, so that each segment sees whole parts of it."""
        return sorted({edge for one in self.segments for span in one.seen for edge in span})

    @cached_property
    def sizes(self) -> list[int]:
        """Numbers of tokens of these parts."""
        return [stop - start for start, stop in pairwise(self.edges)]

    @cached_property
    def seen(self) -> list[list[int]]:
        """Which of these parts each segment sees."""
        part = {edge: number for number, edge in enumerate(self.edges)}
        return [
            [number for start, stop in one.seen for number in range(part[start], part[stop])]
            for one in self.segments
        ]

    def of_segment(self, number: int, window: int | None, like: Tensor) -> Tensor | None:
        """Return what is added to the scores of a segment, ``(tokens, seen)``; ``None``: causal.

        Args:
            number: Of the segment.
            window: A token sees so many positions, its own included; ``None``: all.
            like: Has the dtype and device.
        """
        key = (number, window, like.dtype)
        if key not in self._masks:
            segment, positions = self.segments[number], self.tree.positions
            i = torch.arange(*segment.span, device=positions.device)[:, None]
            j = torch.cat([torch.arange(*span, device=i.device) for span in segment.seen])
            sees = (j <= i) & (i < self.tree.ends[j])
            if window is not None:
                sees &= positions[i] - positions[j] < window
            causal = not segment.context and torch.equal(sees, torch.ones_like(sees).tril())
            zeros = torch.zeros(sees.shape, dtype=like.dtype, device=like.device)
            self._masks[key] = None if causal else zeros.masked_fill(~sees, -torch.inf)
        return self._masks[key]

    def blocks(self, window: int | None) -> BlockMask:
        """Return the mask of the whole tree for FlexAttention.

        Args:
            window: As for :meth:`of_segment`.
        """
        if window not in self._blocks:
            ends, positions = self.tree.ends, self.tree.positions

            def sees(_b: Tensor, _h: Tensor, i: Tensor, j: Tensor) -> Tensor:
                descends = (j <= i) & (i < ends[j])
                return descends if window is None else descends & near(i, j)

            def near(i: Tensor, j: Tensor) -> Tensor:
                return positions[i] - positions[j] < torch.tensor(window, device=ends.device)

            count = len(ends)
            self._blocks[window] = create_block_mask(
                sees, B=None, H=None, Q_LEN=count, KV_LEN=count, device=str(ends.device)
            )
        return self._blocks[window]


def segments(ends: NDArray[np.int64], longest: int) -> list[Segment]:
    """Cut a tree into segments, in order.

    A chain ends where a token has no child behind it. Chains are put together as far as they fit;
    in preorder, what one of their tokens descends from before them, their first one does too.

    Args:
        ends: As in :class:`tpmm_pl.types.TokenTree`, ``(T,)``.
        longest: Tokens of several chains together; 1 keeps every chain apart.
    """
    childless = np.flatnonzero(ends[:-1] == np.arange(1, len(ends)))
    bounds = [0]
    for stop, following in pairwise([*(childless + 1).tolist(), len(ends), len(ends) + longest]):
        if following - bounds[-1] > longest:
            bounds.append(stop)
    return [
        Segment((start, stop), _spans(np.flatnonzero(ends[:start] > start)))
        for start, stop in pairwise(bounds)
    ]


def _spans(tokens: NDArray[np.int64]) -> tuple[Span, ...]:
    runs = np.split(tokens, np.flatnonzero(np.diff(tokens) != 1) + 1)
    return tuple((int(run[0]), int(run[-1]) + 1) for run in runs if len(run))


def tree_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    *,
    otherwise: str,
    tree: TreeMask | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attend as transformers' attention functions do; without a tree, as ``otherwise`` does.

    Args:
        module: The attention layer.
        query: ``(1, heads, T, width)``.
        key: ``(1, key heads, T, width)``.
        value: ``(1, key heads, T, width)``.
        attention_mask: Of ``otherwise``; a tree has its own.
        otherwise: Name of the attention that the model has for rows.
        tree: The batch; ``None``: rows.
        scaling: Of the scores.
        dropout: Probability of dropping a weight.
        sliding_window: As for :meth:`TreeMask.of_segment`.
        softcap: Scores end softly at this value (Gemma 2).
        **kwargs: What else a model hands over.

    Returns:
        ``(1, T, heads, width)``, and no weights.

    Raises:
        ValueError: If the model hands over what a tree has no form of, as attention sinks, or
            keeps its window to itself.
    """
    if tree is None:
        kwargs |= {"scaling": scaling, "dropout": dropout}
        given = {"sliding_window": sliding_window, "softcap": softcap}
        kwargs |= {name: value for name, value in given.items() if value is not None}
        return _attention(otherwise, module)(module, query, key, value, attention_mask, **kwargs)  # type: ignore[no-any-return]
    unknown = [name for name in ("s_aux", "position_bias") if kwargs.get(name) is not None]
    if sliding_window is None and _slides(module):
        unknown.append("a window in its mask only")
    if unknown:
        raise ValueError(f"attention with {', '.join(unknown)} has no form for token trees")
    # autocast may hand over values in another dtype than rotated queries and keys
    query, key = query.to(value.dtype), key.to(value.dtype)
    if query.is_cuda:
        return flex_attention_forward(
            module, query, key, value, tree.blocks(sliding_window),
            scaling=scaling, softcap=softcap, dropout=dropout,
        )  # fmt: skip
    attend = partial(_attend, scale=scaling, softcap=softcap, dropout=dropout)
    return _in_segments(query, key, value, tree, sliding_window, attend), None


def _in_segments(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    tree: TreeMask,
    window: int | None,
    attend: Callable[..., Tensor],
) -> Tensor:
    # cut once and joined once: of a slice for every segment, head and layer the backward pass would
    # make a zero-filled gradient of the whole row
    lengths = [stop - start for start, stop in (one.span for one in tree.segments)]
    queries = query.split(lengths, dim=2)
    keys, values = key.split(tree.sizes, dim=2), value.split(tree.sizes, dim=2)
    attended = [
        attend(part, _join(keys, seen), _join(values, seen), tree.of_segment(number, window, query))
        for number, (part, seen) in enumerate(zip(queries, tree.seen, strict=True))
    ]
    return torch.cat([part.transpose(1, 2) for part in attended], dim=1)


def _join(parts: Sequence[Tensor], chosen: Sequence[int]) -> Tensor:
    return torch.cat([parts[number] for number in chosen], dim=2)


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    *,
    scale: float | None,
    softcap: float | None,
    dropout: float,
) -> Tensor:
    if softcap is None:
        return F.scaled_dot_product_attention(
            query, key, value, mask, dropout, is_causal=mask is None, scale=scale, enable_gqa=True
        )
    groups = query.shape[1] // key.shape[1]
    key, value = (tensor.repeat_interleave(groups, dim=1) for tensor in (key, value))
    scores = query @ key.mT * (query.shape[-1] ** -0.5 if scale is None else scale)
    scores = (scores / softcap).tanh() * softcap
    if mask is None:
        mask = torch.full(scores.shape[-2:], -torch.inf, device=scores.device).triu(1)
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    weights = (scores + mask).softmax(-1).to(value.dtype)
    return F.dropout(weights, dropout) @ value


def _slides(module: nn.Module) -> bool:
    # by its configuration: short rows would not show that a window is missing
    config: Any = getattr(module, "config", None)
    layers = getattr(config, "layer_types", None)
    layer = "sliding_attention" if layers is None else layers[int(cast(Any, module).layer_idx)]
    return layer == "sliding_attention" and getattr(config, "sliding_window", None) is not None


def _attention(name: str, module: nn.Module) -> Callable[..., Any]:
    if name == "eager":
        # not in the registry: every family's file has its own
        return import_module(type(module).__module__).eager_attention_forward  # type: ignore[no-any-return]
    return ALL_ATTENTION_FUNCTIONS[name]  # type: ignore[no-any-return]


def attend_trees(model: PreTrainedModel) -> bool:
    """Make a model's attention understand the argument ``tree``; without it nothing changes.

    Args:
        model: Of transformers; remembers no tree.

    Returns:
        Whether its attention is one that can be replaced, in all layers.
    """
    config = model.config
    name = str(config._attn_implementation).removeprefix(_PREFIX)
    layers = set(getattr(config.get_text_config(), "layer_types", None) or _PLAIN_LAYERS)
    if not getattr(model, "_supports_attention_backend", False) or not layers <= _PLAIN_LAYERS:
        return False
    _register(name)
    config._attn_implementation = _PREFIX + name
    return True


def _register(name: str) -> None:
    AttentionInterface.register(_PREFIX + name, partial(tree_attention, otherwise=name))
    masks = ALL_MASK_ATTENTION_FUNCTIONS
    if name in masks:
        AttentionMaskInterface.register(_PREFIX + name, masks[name])


# at once: a pickled model looks for it in another process
for _name in ("eager", *ALL_ATTENTION_FUNCTIONS):
    _register(_name)
