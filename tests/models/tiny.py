"""Tiny seeded models and a tokenizer for tests; nothing is downloaded."""

from __future__ import annotations

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

PAD, EOS, UNKNOWN, USER, ASSISTANT, SYSTEM = range(6)
WORDS = [f"w{index}" for index in range(26)]
"""Tokens 6 to 31."""

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<' + message['role'] + '> ' + message['content'] + ' <eos>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant> ' }}{% endif %}"
)


def tiny_llama(*, seed: int = 0, tied: bool = False, dropout: float = 0.0) -> LlamaForCausalLM:
    """Two layers, width 16, vocabulary 32."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=128,
        attention_dropout=dropout,
        tie_word_embeddings=tied,
        pad_token_id=PAD,
        bos_token_id=None,
        eos_token_id=EOS,
    )
    return LlamaForCausalLM(config)


def tiny_gpt2(*, seed: int = 0, dropout: float = 0.1) -> GPT2LMHeadModel:
    """Two layers, width 16, vocabulary 32; tied embeddings, absolute positions, dropout."""
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=32,
        n_embd=16,
        n_layer=2,
        n_head=2,
        n_positions=128,
        resid_pdrop=dropout,
        embd_pdrop=dropout,
        attn_pdrop=dropout,
        pad_token_id=PAD,
        bos_token_id=None,
        eos_token_id=EOS,
    )
    return GPT2LMHeadModel(config)


def tiny_reward_model(
    *, labels: int = 1, pad_id: int | None = PAD
) -> LlamaForSequenceClassification:
    """Two layers, width 16, vocabulary 32, one score."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        pad_token_id=pad_id,
        bos_token_id=None,
        eos_token_id=EOS,
    )
    config.num_labels = labels
    return LlamaForSequenceClassification(config)


def tiny_gpt2_reward() -> GPT2ForSequenceClassification:
    """GPT-2 with one score."""
    config = tiny_gpt2().config
    config.num_labels = 1
    torch.manual_seed(0)
    return GPT2ForSequenceClassification(config)


def tiny_bert() -> BertForSequenceClassification:
    """Two layers, width 16, vocabulary 32, one score; an encoder."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=32,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=64,
        pad_token_id=PAD,
    )
    config.num_labels = 1
    return BertForSequenceClassification(config)


def tiny_tokenizer(*, pad: bool = True, template: bool = True) -> PreTrainedTokenizerFast:
    """One token a word: ``<pad> <eos> <unk> <user> <assistant> <system> w0 .. w25``."""
    names = ["<pad>", "<eos>", "<unk>", "<user>", "<assistant>", "<system>", *WORDS]
    vocabulary = {word: index for index, word in enumerate(names)}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<eos>",
        unk_token="<unk>",
        pad_token="<pad>" if pad else None,
        chat_template=CHAT_TEMPLATE if template else None,
    )
