"""Judges of the letters task: the gold rule and the biased annotator's utility."""

from __future__ import annotations

from collections.abc import Sequence

from tpmm_pl.toy.letters import gold_score, proxy_score
from tpmm_pl.types import Completion


class LettersGold:
    """The true score in [0, 1]: correctness, with two polite words as the ideal style."""

    def __call__(self, completions: Sequence[Completion]) -> list[float]:
        """Return the gold score of each completion.

        Raises:
            ValueError: If a prompt is not one of the letters task.
        """
        return [
            gold_score(one.prompt.text.split(), one.text.split(), finished=one.finished)
            for one in completions
        ]


class LettersProxy:
    """The biased annotator's utility: correctness plus a bonus for every polite word.

    Args:
        bias: Added for each polite word; 0 leaves correctness alone.
    """

    def __init__(self, bias: float = 0.1) -> None:
        self.bias = bias

    def __call__(self, completions: Sequence[Completion]) -> list[float]:
        """Return the utility of each completion, unbounded above.

        Raises:
            ValueError: If a prompt is not one of the letters task.
        """
        return [
            proxy_score(
                one.prompt.text.split(), one.text.split(), finished=one.finished, bias=self.bias
            )
            for one in completions
        ]
