"""Log-probabilities of completions under a causal language model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tpmm_pl import processes
from tpmm_pl.data.batching import cut_by_tokens, pair_batches
from tpmm_pl.data.packing import TOKEN_BUDGET, pack_rows, pair_rows
from tpmm_pl.data.table import PairTable, as_table
from tpmm_pl.logps import head_logps, split_pairs, token_logps
from tpmm_pl.models.sharding import unsharded_type
from tpmm_pl.models.tree_pass import TreePass, unwrapped
from tpmm_pl.modes import evaluating
from tpmm_pl.types import Completion, Pair, PairBatch, PairLogps, TokenTree


class PairScorer:
    """Scores token trees of pairs; the head is applied where it predicts a completion only.

    The backbone and the head are taken apart where that computes what the model's own forward
    does; models that treat logits further (soft caps, scales) go through their own forward.

    Args:
        model: A Hugging Face causal language model or a ``PeftModel`` of one.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._parts = _backbone_and_head(model)
        self._pass = TreePass(model, model if self._parts is None else self._parts[0])

    def __call__(self, batch: PairBatch) -> PairLogps:
        """Return the summed log-probabilities in nats of each pair's completions, ``(B,)``."""
        return split_pairs(self.rows(batch.tree))

    def rows(self, tree: TokenTree) -> Tensor:
        """Return the summed log-probability of each row's completion, ``(N,)`` nats."""
        return tree.sums(self.tokens(tree))

    def tokens(self, tree: TokenTree) -> Tensor:
        """Return the log-probability of every scored token, ``(S,)`` nats, float32."""
        values, state_of = self._states(tree)
        if self._parts is None:
            return token_logps(values, state_of, tree.targets)
        head = self._parts[1]
        return head_logps(values, head.weight, head.bias, state_of, tree.targets)

    def _states(self, tree: TokenTree) -> tuple[Tensor, Tensor]:
        if not self._pass.packs:
            values = self._pass.padded(tree, tree.row_of, tree.states[tree.state_of])
            return values, torch.arange(len(values), device=values.device)
        return self._pass.packed(tree, tree.states), tree.state_of


def pair_tokens(batch: PairBatch) -> PairLogps:
    """Count the completion tokens of each pair, ``(B,)`` float32 each."""
    return split_pairs(batch.tree.lengths())


@torch.no_grad()
def score_pairs(
    model: nn.Module, pairs: Sequence[Pair], *, token_budget: int = TOKEN_BUDGET
) -> PairLogps:
    """Score all pairs in one pass without gradients.

    Args:
        model: A causal language model; its mode is left as it is.
        pairs: What to score.
        token_budget: Tokens of a batch.

    Returns:
        Log-probabilities in nats, ``(len(pairs),)`` float32 on the CPU, in the order of ``pairs``.
    """
    scorer = PairScorer(model)
    device = next(model.parameters()).device
    # not in the default dtype, which a fit in lower precision sets
    chosen, rejected = torch.empty(2, len(pairs), dtype=torch.float32)
    table = as_table(pairs)
    for indices in pair_batches(table, token_budget):
        tree = pack_rows(pair_rows(table.select(indices))).to(device)
        logps = split_pairs(scorer.rows(tree).cpu())
        chosen[indices], rejected[indices] = logps
    return PairLogps(chosen, rejected)


def score_shared(
    model: nn.Module, pairs: PairTable, *, token_budget: int = TOKEN_BUDGET
) -> PairLogps:
    """Score all pairs, each process its share; return what :func:`score_pairs` does to all."""
    mine = pairs.select(processes.share(range(len(pairs))))
    logps = score_pairs(model, mine, token_budget=token_budget)
    together = processes.gathered(torch.stack(logps, 1).tolist())
    chosen, rejected = torch.tensor(together, dtype=torch.float32).reshape(-1, 2).T.contiguous()
    return PairLogps(chosen, rejected)


@torch.no_grad()
def score_completions(
    model: nn.Module, completions: Sequence[Completion], *, token_budget: int = TOKEN_BUDGET
) -> Tensor:
    """Score sampled completions under another model.

    Args:
        model: A causal language model.
        completions: Their prompts and tokens are scored.
        token_budget: Tokens of a batch.

    Returns:
        Log-probabilities in nats, ``(len(completions),)`` float32 on the CPU.
    """
    scorer = PairScorer(model)
    device = next(model.parameters()).device
    logps = torch.empty(len(completions), dtype=torch.float32)
    rows = [(one.prompt.ids, one.ids) for one in completions]
    lengths = np.array([(len(prompt), len(ids)) for prompt, ids in rows])
    for indices in cut_by_tokens([prompt for prompt, _ in rows], lengths, token_budget):
        tree = pack_rows([rows[index] for index in indices]).to(device)
        logps[indices] = scorer.rows(tree).cpu()
    return logps


def _backbone_and_head(model: nn.Module) -> tuple[nn.Module, nn.Linear] | None:
    inner: Any = unwrapped(model)
    backbone = getattr(inner, "base_model", None)
    head = inner.get_output_embeddings() if hasattr(inner, "get_output_embeddings") else None
    # nothing that an adapter or a quantised form has put around it
    linear = isinstance(head, nn.Linear) and unsharded_type(head) is nn.Linear
    if backbone is None or backbone is inner or head is None or not linear:
        return None
    device = next(model.parameters()).device
    # not token 0: often the padding, whose zero embedding gives zero logits, capped or not
    tokens = torch.arange(1, 9, device=device)[None] % inner.get_input_embeddings().weight.shape[0]
    with torch.no_grad(), evaluating(model):
        whole = model(input_ids=tokens, use_cache=False).logits
        parts = head(backbone(input_ids=tokens, use_cache=False).last_hidden_state)
    # bit for bit: a cap hardly bends the small logits of a model that is yet to be trained
    return (backbone, head) if torch.equal(whole.float(), parts.float()) else None
