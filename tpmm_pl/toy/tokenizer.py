"""The tokenizer of the letters task: one token a word, built in code."""

from __future__ import annotations

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from tpmm_pl.toy.letters import EOS, PAD, TOKEN_IDS


def letters_tokenizer() -> PreTrainedTokenizerFast:
    """Return a fast tokenizer whose token ids are places in the vocabulary.

    Words are separated by blanks, in and out. There is no unknown token: a foreign word raises.
    """
    backend = Tokenizer(WordLevel(TOKEN_IDS))
    backend.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD,
        eos_token=EOS,
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
    )
