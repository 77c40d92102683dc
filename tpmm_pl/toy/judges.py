"""Judges of the letters task: the gold rule and the biased annotator's utility."""

from __future__ import annotations

from collections.abc import Sequence

from tpmm_pl.toy.letters import family, gold_score, proxy_score
from tpmm_pl.types import Completion, InputError


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
        bias: Added for each polite word; 0 leaves correctness alone. Several values are several
            annotators, each for a family of tasks: the first operations, dealt out in turn.
    """

    def __init__(self, bias: float | list[float] = 0.1) -> None:
        self.biases = bias if isinstance(bias, list) else [bias]
        if not self.biases:
            raise InputError("the list of biases is empty; give one an annotator")

    def __call__(self, completions: Sequence[Completion]) -> list[float]:
        """Return the utility of each completion, unbounded above.

        Raises:
            ValueError: If a prompt is not one of the letters task.
        """
        return [self._score(one) for one in completions]

    def _score(self, completion: Completion) -> float:
        prompt = completion.prompt.text.split()
        bias = self.biases[family(prompt) % len(self.biases)]
        words = completion.text.split()
        return proxy_score(prompt, words, finished=completion.finished, bias=bias)
