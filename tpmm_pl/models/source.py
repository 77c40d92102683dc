"""Where a policy comes from."""

from __future__ import annotations

from typing import Any, Protocol

from transformers import PreTrainedModel, PreTrainedTokenizerBase


class PolicySource(Protocol):
    """Makes the starting policy and its tokenizer."""

    def prepare(self) -> None:
        """Make or fetch what loading needs; runs once, in one process."""
        ...

    def load_model(self) -> PreTrainedModel:
        """Return the starting policy in training mode with dropout off (a PeftModel for LoRA)."""
        ...

    def load_tokenizer(self) -> PreTrainedTokenizerBase:
        """Return the policy's tokenizer."""
        ...

    def describe(self) -> dict[str, Any]:
        """Return plain JSON values that identify the starting policy, for the manifest."""
        ...
