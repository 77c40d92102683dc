"""Rows of tokens as a token tree: what several rows begin with is there once."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tpmm_pl.data.table import as_table
from tpmm_pl.types import Pair, TokenTree

TOKEN_BUDGET = 4096
"""Tokens that go through a model at once, unless set otherwise."""

Ids = Sequence[int] | NDArray[np.integer[Any]]
"""Token ids; arrays pack fastest."""


def pack_rows(rows: Sequence[tuple[Ids, Ids]]) -> TokenTree:
    """Pack rows of (prompt, completion) into one row without padding or repetition.

    Rows that begin alike share these tokens: the two completions of a prompt, several pairs of a
    prompt, the system prompt of a batch. In sorted order every row adds what lies behind its
    common beginning with the row before, which writes the tree in preorder.

    Args:
        rows: N of them, at least one; completions are what is scored.

    Returns:
        The tree of T distinct tokens; ``row_of`` counts rows as they were given.

    Raises:
        ValueError: If a completion is empty: nothing of it could be scored.
    """
    for number, (_, completion) in enumerate(rows):
        if not len(completion):
            raise ValueError(f"row {number} of {len(rows)} has an empty completion")
    whole = [np.concatenate(row, dtype=np.int64, casting="unsafe") for row in rows]
    # big-endian bytes sort as the ids do, without an object for each of them
    order = sorted(range(len(rows)), key=[ids.astype(">i8").tobytes() for ids in whole].__getitem__)
    shared = [0, *(_common(whole[a], whole[b]) for a, b in pairwise(order))]
    total = sum(len(row) for row in whole) - sum(shared)
    tokens, positions, ends = (np.empty(total, dtype=np.int64) for _ in range(3))
    path, count = np.empty(0, dtype=np.int64), 0
    paths = dict.fromkeys(range(len(rows)), path)
    for row, common in zip(order, shared, strict=True):
        ends[path[common:]] = count  # what the row before had alone ends here
        stop = count + len(whole[row]) - common
        tokens[count:stop] = whole[row][common:]
        positions[count:stop] = np.arange(common, len(whole[row]))
        path = np.concatenate([path[:common], np.arange(count, stop)])
        paths[row], count = path, stop
    ends[path] = count
    # the first token of a row without a prompt is predicted by nothing
    begins = [max(1, len(prompt)) for prompt, _ in rows]
    predicting = np.concatenate([paths[row][begin - 1 : -1] for row, begin in enumerate(begins)])
    used = np.zeros(total, dtype=bool)
    used[predicting] = True
    states, state_of = np.flatnonzero(used), used.cumsum()[predicting] - 1
    scored = [whole[row][begin:] for row, begin in enumerate(begins)]
    arrays = (
        tokens,
        positions,
        ends,
        np.array([paths[row][-1] for row in range(len(rows))]),
        states,
        np.concatenate(scored),
        state_of,
        np.repeat(np.arange(len(rows)), [len(row) for row in scored]),
    )
    return TokenTree(*map(torch.from_numpy, arrays))


def pair_rows(pairs: Sequence[Pair]) -> list[tuple[Ids, Ids]]:
    """Return the rows of B pairs: all chosen, then all rejected sequences."""
    return [*as_table(pairs).token_rows()]


def pad_tree(tree: TokenTree, pad_id: int = 0) -> tuple[Tensor, Tensor]:
    """Return the rows of a tree one by one, padded on the right.

    Args:
        tree: N rows.
        pad_id: Token id written on padding.

    Returns:
        Token ids and attention mask, each ``(N, T)`` int64.
    """
    count = torch.arange(len(tree.tokens), device=tree.tokens.device)
    leaves = tree.leaves[:, None]
    row, token = ((count <= leaves) & (leaves < tree.ends)).nonzero(as_tuple=True)
    position = tree.positions[token]
    ids = tree.tokens.new_full((len(tree.leaves), int(position.max()) + 1), pad_id)
    ids[row, position] = tree.tokens[token]
    mask = torch.zeros_like(ids)
    mask[row, position] = 1
    return ids, mask


def _common(a: NDArray[np.int64], b: NDArray[np.int64]) -> int:
    shorter = min(len(a), len(b))
    different = a[:shorter] != b[:shorter]
    return int(different.argmax()) if different.any() else shorter
