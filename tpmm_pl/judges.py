"""Judges that score completions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from tpmm_pl.data.packing import TOKEN_BUDGET
from tpmm_pl.data.tokens.chat import judged_ids
from tpmm_pl.merging import linear_merge
from tpmm_pl.models.load import load_reward_model
from tpmm_pl.models.reward import RewardScorer, score_rows
from tpmm_pl.registry import lookup
from tpmm_pl.types import Completion, InputError


class RewardModelJudge:
    """A Hugging Face sequence-classification model with one score, or a mixture of experts of ours.

    Text is scored, not tokens: the judge has a tokenizer and chat template of its own, which need
    not be the policy's; where it has a template, a plain prompt is a user's turn, where it has
    none, a finished answer ends in its end-of-sequence token. The model is loaded when the first
    completion is scored, once for all judges of one name.

    Args:
        name_or_path: Hub id or folder.
        max_length: Tokens of prompt and completion; the end is kept.
        token_budget: Tokens scored at once; those that completions begin with alike count once.
        dtype: Of the weights.
        device: Where it runs; by default on the accelerator where there is one.
    """

    def __init__(
        self,
        name_or_path: str,
        max_length: int = 2048,
        token_budget: int = TOKEN_BUDGET,
        dtype: str = "float32",
        device: str | None = None,
    ) -> None:
        self.name_or_path = name_or_path
        self.max_length = max_length
        self.token_budget = token_budget
        self.dtype = dtype
        self.device = device or ("cuda" if torch.cuda.is_available() else "cpu")

    def __call__(self, completions: Sequence[Completion]) -> list[float]:
        """Return the model's score of each completion in its conversation.

        Raises:
            InputError: If a score is not a number.
        """
        model, tokenizer = _loaded((self.name_or_path,), self.dtype, self.device)
        return self._scores(completions, model, tokenizer)

    @torch.no_grad()
    def _scores(
        self, completions: Sequence[Completion], model: nn.Module, tokenizer: Any
    ) -> list[float]:
        rows = [judged_ids(one, tokenizer)[-self.max_length :] for one in completions]
        # the model's own forward reads the score before the padding, which may be its end token
        ended = [_before(tokenizer.pad_token_id, row) for row in rows]
        scores = score_rows(RewardScorer(model), ended, token_budget=self.token_budget)
        if not scores.isfinite().all():
            raise InputError(
                f"{self.name_or_path} gives scores that are not finite; check its weights, or its "
                f"dtype {self.dtype}"
            )
        return scores.tolist()


def _before(pad_id: int, row: tuple[int, ...]) -> tuple[int, ...]:
    length = len(row)
    while length > 1 and row[length - 1] == pad_id:
        length -= 1
    return row[:length]


def worst_case(scores: Tensor, penalty: float) -> Tensor:
    """Return the lowest score of each answer (Coste et al. 2023, WCO); no ``penalty``."""
    return scores.amin(0)


def mean_score(scores: Tensor, penalty: float) -> Tensor:
    """Return the mean score of each answer; no ``penalty``."""
    return scores.mean(0)


def uncertainty_penalised(scores: Tensor, penalty: float) -> Tensor:
    """Return the mean less ``penalty`` times the variance over members (Coste et al. 2023, UWO).

    Args:
        scores: ``(M, n)``.
        penalty: 0 is the mean.
    """
    return scores.mean(0) - penalty * scores.var(0, correction=0)


COMBINATIONS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "mean": mean_score,
    "worst": worst_case,
    "penalised": uncertainty_penalised,
}


class RewardEnsembleJudge:
    """Several reward models of one architecture and tokenizer as one judge.

    Args:
        names_or_paths: Hub ids or folders of the members.
        combine: ``mean``, ``worst`` (the lowest), ``penalised`` (mean less variance), or
            ``weights``: one model whose weights are the members' average (WARM, Rame et al. 2024).
        penalty: Of the variance.
        max_length: Tokens of prompt and completion; the end is kept.
        token_budget: Tokens scored at once; those that completions begin with alike count once.
        dtype: Of the weights.
        device: Where they run; by default on the accelerator where there is one.

    Raises:
        InputError: If there are fewer than two members, or ``combine`` is unknown.
    """

    def __init__(
        self,
        names_or_paths: list[str],
        combine: str = "mean",
        penalty: float = 1.0,
        max_length: int = 2048,
        token_budget: int = TOKEN_BUDGET,
        dtype: str = "float32",
        device: str | None = None,
    ) -> None:
        if len(names_or_paths) < 2:
            raise InputError(f"an ensemble needs two members or more, not {names_or_paths}")
        lookup("combination", combine, {**COMBINATIONS, "weights": None})
        self.members = [
            RewardModelJudge(name, max_length, token_budget, dtype, device)
            for name in names_or_paths
        ]
        self.combine = combine
        self.penalty = penalty

    def __call__(self, completions: Sequence[Completion]) -> list[float]:
        """Return the combined score of each completion."""
        first = self.members[0]
        if self.combine == "weights":
            names = tuple(member.name_or_path for member in self.members)
            return first._scores(completions, *_loaded(names, first.dtype, first.device))
        scores = torch.tensor([member(completions) for member in self.members])
        return COMBINATIONS[self.combine](scores, self.penalty).tolist()


@lru_cache(maxsize=16)
def _loaded(names: tuple[str, ...], dtype: str, device: str) -> tuple[nn.Module, Any]:
    # several names: one model of their average weights
    model, tokenizer = load_reward_model(names[0], dtype=dtype)
    if len(names) > 1:
        states = [load_reward_model(name, dtype=dtype)[0].state_dict() for name in names]
        try:
            model.load_state_dict(linear_merge(states, torch.full((len(names),), 1 / len(names))))
        except ValueError as error:
            raise InputError(f"the members of {names} cannot be averaged: {error}") from error
    # the score is read at the last token that the model does not take for padding
    tokenizer.pad_token_id = model.config.pad_token_id
    return nn.Module.to(model, device), tokenizer
