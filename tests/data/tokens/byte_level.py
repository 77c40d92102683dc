"""Byte-level tokenizers of the kinds in use, and templates as models have them."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import AddedToken, Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

PAD, BOS, START, EOS = "<pad>", "<bos>", "<start>", "<end>"
PAD_ID, BOS_ID, START_ID, EOS_ID = range(4)

ADDS = {
    "nothing": "$A",
    "its beginning": f"{BOS} $A",
    "its end": f"$A {EOS}",
    "both": f"{BOS} $A {EOS}",
}
"""What a tokenizer writes around a text by itself."""

_BEGIN = "{% for m in messages %}{{ '<start>' + m['role'] + '\\n' + "
_ASK = "{% endfor %}{% if add_generation_prompt %}{{ '<start>assistant\\n' }}{% endif %}"
_DEFAULT_SYSTEM = (
    "{% if messages[0]['role'] != 'system' %}{{ '<start>system\\nYou help.<end>\\n' }}{% endif %}"
)

CHATML = _BEGIN + "m['content'] + '<end>\\n' }}" + _ASK
"""Ends a turn with the end-of-sequence token and a newline."""

TEMPLATES = {
    "chatml": CHATML,
    "no newline behind a turn": _BEGIN + "m['content'] + '<end>' }}" + _ASK,
    "its own beginning": "{{ bos_token }}" + _BEGIN + "m['content'] + '<end>' }}" + _ASK,
    "stripped content": _BEGIN + "m['content'] | trim + '<end>\\n' }}" + _ASK,
    "a default system prompt": _DEFAULT_SYSTEM + CHATML,
    "no end of a turn": _BEGIN + "m['content'] + '\\n' }}" + _ASK,
}

_MERGES = [("Ġ", "t"), ("h", "e"), ("Ġt", "he"), ("Ċ", "Ċ"), ("Ġ", "Ġ"), ("l", "l"), ("e", "ll")]
"""``Ġ`` is a blank, ``Ċ`` a line break; tokens of either can span the border of two texts."""


def byte_tokenizer(adds: str = "nothing", template: str | None = CHATML) -> PreTrainedTokenizerFast:
    """Four special tokens, the 256 bytes, a few merges."""
    words = [PAD, BOS, START, EOS, *sorted(ByteLevel.alphabet())]
    words += ["".join(pair) for pair in _MERGES]
    tokenizer = Tokenizer(BPE({word: index for index, word in enumerate(words)}, _MERGES))
    tokenizer.add_special_tokens([AddedToken(word, normalized=False) for word in words[:4]])
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevelDecoder()
    tokenizer.post_processor = TemplateProcessing(
        single=ADDS[adds], special_tokens=[(BOS, BOS_ID), (EOS, EOS_ID)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        chat_template=template,
    )


def decoded(ids: Sequence[int]) -> str:
    """The text of tokens, special ones shown."""
    return str(byte_tokenizer().decode([*ids]))
