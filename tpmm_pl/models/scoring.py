"""Log-probabilities of completions under a causal language model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tpmm_pl.data.batching import collate, length_sorted_batches, pad_rows
from tpmm_pl.logps import completion_logps, completion_tokens, split_pairs
from tpmm_pl.types import Completion, Pair, PairBatch, PairLogps


class PairScorer:
    """Scores padded pairs; applies the language-model head to completion positions only.

    The backbone and the head are taken apart where that computes what the model's own forward
    does; models that treat logits further (soft caps, scales) go through their own forward.

    Args:
        model: A Hugging Face causal language model or a ``PeftModel`` of one.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._parts = _backbone_and_head(model)

    def __call__(self, batch: PairBatch) -> PairLogps:
        """Return the summed log-probabilities in nats of each pair's completions, ``(B,)``."""
        return split_pairs(self.rows(batch.input_ids, batch.attention_mask, batch.labels))

    def rows(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> Tensor:
        """Return the summed log-probability of each row's labelled tokens, ``(N,)`` nats.

        Args:
            input_ids: ``(N, T)`` int64.
            attention_mask: ``(N, T)``, 1 on tokens; the padding is on the right.
            labels: ``(N, T)`` int64, ``IGNORE_INDEX`` where nothing is scored.
        """
        groups = length_groups(attention_mask)
        logps = [
            self._group(input_ids[rows, :width], labels[rows, :width]) for rows, width in groups
        ]
        order = torch.cat([rows for rows, _ in groups])
        return torch.cat(logps)[order.argsort()]

    def _group(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        # no mask: padding is on the right, where a causal model cannot look from a labelled token
        inputs = {"input_ids": input_ids, "use_cache": False}
        if self._parts is None:
            return completion_logps(self.model(**inputs).logits, labels, nn.Identity())
        backbone, head = self._parts
        hidden = backbone(**inputs).last_hidden_state
        return completion_logps(hidden, labels, head, vocabulary=_rows(head))


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


def pair_tokens(batch: PairBatch) -> PairLogps:
    """Count the completion tokens of each pair, ``(B,)`` float32 each."""
    return split_pairs(completion_tokens(batch.labels))


@torch.no_grad()
def score_pairs(
    model: nn.Module, pairs: Sequence[Pair], *, pad_id: int, batch_size: int
) -> PairLogps:
    """Score all pairs in one pass without gradients, in batches of similar length.

    Args:
        model: A causal language model; its mode is left as it is.
        pairs: What to score.
        pad_id: Token that fills rows.
        batch_size: Pairs a batch.

    Returns:
        Log-probabilities in nats, ``(len(pairs),)`` float32 on the CPU, in the order of ``pairs``.
    """
    scorer = PairScorer(model)
    device = next(model.parameters()).device
    chosen, rejected = torch.empty(len(pairs)), torch.empty(len(pairs))
    for indices in length_sorted_batches(pairs, batch_size):
        batch = collate([pairs[index] for index in indices], pad_id)
        logps = scorer(on_device(batch, device))
        chosen[indices], rejected[indices] = logps.chosen.cpu(), logps.rejected.cpu()
    return PairLogps(chosen, rejected)


@torch.no_grad()
def score_completions(
    model: nn.Module, completions: Sequence[Completion], *, pad_id: int, batch_size: int = 256
) -> Tensor:
    """Score sampled completions under another model.

    Args:
        model: A causal language model.
        completions: Their prompts and tokens are scored.
        pad_id: Token that fills rows.
        batch_size: Rows a batch.

    Returns:
        Log-probabilities in nats, ``(len(completions),)`` float32 on the CPU.
    """
    scorer = PairScorer(model)
    device = next(model.parameters()).device
    rows = [(c.prompt.ids, c.ids) for c in completions]
    order = sorted(range(len(rows)), key=lambda i: len(rows[i][0]) + len(rows[i][1]))
    logps = torch.empty(len(rows))
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        padded = pad_rows([rows[i] for i in chosen], pad_id)
        logps[chosen] = scorer.rows(*(tensor.to(device) for tensor in padded)).cpu()
    return logps


def on_device(batch: PairBatch, device: torch.device) -> PairBatch:
    """Move a batch."""
    reference = PairLogps(*(tensor.to(device) for tensor in batch.reference))
    tensors = {
        name: getattr(batch, name).to(device)
        for name in ("input_ids", "attention_mask", "labels", "weight", "margin")
    }
    return PairBatch(**tensors, reference=reference)


def _rows(head: nn.Module) -> int:
    weight: Tensor | None = getattr(head, "weight", None)
    return 0 if weight is None else weight.shape[0]


def _backbone_and_head(model: nn.Module) -> tuple[nn.Module, nn.Module] | None:
    get_base = getattr(model, "get_base_model", None)
    inner: Any = model if get_base is None else get_base()
    backbone = getattr(inner, "base_model", None)
    head = inner.get_output_embeddings() if hasattr(inner, "get_output_embeddings") else None
    if backbone is None or backbone is inner or head is None:
        return None
    device = next(model.parameters()).device
    # not token 0: often the padding, whose zero embedding gives zero logits, capped or not
    tokens = torch.arange(1, 9, device=device)[None] % inner.get_input_embeddings().weight.shape[0]
    training = model.training
    with torch.no_grad():
        model.eval()
        whole = model(input_ids=tokens, use_cache=False).logits
        parts = head(backbone(input_ids=tokens, use_cache=False).last_hidden_state)
        model.train(training)
    # bit for bit: a cap hardly bends the small logits of a model that is yet to be trained
    return (backbone, head) if torch.equal(whole.float(), parts.float()) else None
