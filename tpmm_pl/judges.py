"""Judges that score completions."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import nn

from tpmm_pl.models.load import load_reward_model
from tpmm_pl.types import Completion


class RewardModelJudge:
    """A Hugging Face sequence-classification model with one score.

    Text is scored, not tokens: the judge has a tokenizer and chat template of its own, which need
    not be the policy's; where it has a template, a plain prompt is a user's turn. The model is
    loaded when the first completion is scored, once for all judges of one name.

    Args:
        name_or_path: Hub id or folder.
        max_length: Tokens of prompt and completion; the end is kept.
        batch_size: Completions scored at once.
        dtype: Of the weights.
        device: Where it runs; by default on the accelerator where there is one.
    """

    def __init__(
        self,
        name_or_path: str,
        max_length: int = 2048,
        batch_size: int = 32,
        dtype: str = "float32",
        device: str | None = None,
    ) -> None:
        self.name_or_path = name_or_path
        self.max_length = max_length
        self.batch_size = batch_size
        self.dtype = dtype
        self.device = device or ("cuda" if torch.cuda.is_available() else "cpu")

    @torch.no_grad()
    def __call__(self, completions: Sequence[Completion]) -> list[float]:
        """Return the model's score of each completion in its conversation."""
        model, tokenizer = _loaded(self.name_or_path, self.dtype, self.device)
        texts = [self._text(completion, tokenizer) for completion in completions]
        order = sorted(range(len(texts)), key=lambda index: len(texts[index]))
        scores = [0.0] * len(texts)
        for start in range(0, len(order), self.batch_size):
            chosen = order[start : start + self.batch_size]
            inputs = tokenizer(
                [texts[index] for index in chosen],
                padding=True,
                truncation=True,
                max_length=self.max_length,
                add_special_tokens=tokenizer.chat_template is None,
                return_tensors="pt",
            ).to(self.device)
            values = model(
                input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]
            ).logits.squeeze(-1)
            for index, value in zip(chosen, values.float().tolist(), strict=True):
                scores[index] = value
        return scores

    @staticmethod
    def _text(completion: Completion, tokenizer: Any) -> str:
        prompt = completion.prompt
        if tokenizer.chat_template is None:
            return prompt.text + completion.text
        messages = prompt.messages or ({"role": "user", "content": prompt.text},)
        answer = {"role": "assistant", "content": completion.text}
        text: str = tokenizer.apply_chat_template([*messages, answer], tokenize=False)
        return text


@lru_cache(maxsize=4)
def _loaded(name_or_path: str, dtype: str, device: str) -> tuple[Any, Any]:
    model, tokenizer = load_reward_model(name_or_path, dtype=dtype)
    # on the right: to the left, models with absolute positions would count it
    tokenizer.truncation_side, tokenizer.padding_side = "left", "right"
    # the score is read at the last token that the model does not take for padding
    tokenizer.pad_token_id = model.config.pad_token_id
    return nn.Module.to(model, device), tokenizer
