"""A padding token that means nothing else, known to tokenizer and model."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

_OTHER_TOKENS = ("eos_token", "bos_token", "unk_token", "sep_token", "cls_token", "mask_token")
_PADDING = ("<pad>", "<|pad|>", "[PAD]", "<|reward_pad|>")


def separate_padding(tokenizer: Any) -> None:
    """Let a tokenizer pad with a token that is nothing else: its own, or a new one."""
    others = {getattr(tokenizer, name, None) for name in _OTHER_TOKENS}
    template = str(tokenizer.chat_template or "")
    if tokenizer.pad_token not in {None, *others} and tokenizer.pad_token not in template:
        return
    fresh = next(name for name in _PADDING if name not in others and name not in template)
    tokenizer.add_special_tokens({"pad_token": fresh})


def use_padding(model: PreTrainedModel, pad_id: int) -> None:
    """Tell a model its padding token; its embedding grows where it has no spare row."""
    embedding: Any = model.get_input_embeddings()
    if pad_id >= embedding.weight.shape[0]:
        # not the mean of all rows: nothing reads this one
        embedding = model.resize_token_embeddings(pad_id + 1, mean_resizing=False)
    if getattr(embedding, "padding_idx", None) is not None:
        # this row gets no gradient: no longer the token that padded before
        embedding.padding_idx = pad_id
    model.config.pad_token_id = model.config.get_text_config().pad_token_id = pad_id
