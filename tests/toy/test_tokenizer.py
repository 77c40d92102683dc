from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoTokenizer

from tpmm_pl.toy.letters import VOCABULARY
from tpmm_pl.toy.tokenizer import letters_tokenizer


def test_a_token_id_is_the_place_in_the_vocabulary() -> None:
    tokenizer = letters_tokenizer()
    assert tokenizer.encode(" ".join(VOCABULARY)) == list(range(41))
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (0, 1)
    assert len(tokenizer) == 41


def test_decoding_gives_back_words_without_pad_and_eos() -> None:
    tokenizer = letters_tokenizer()
    ids = [*tokenizer.encode("please b a SEP 3"), 1, 0, 0]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "please b a SEP 3"


def test_a_foreign_word_is_refused() -> None:
    with pytest.raises(Exception, match="UNK"):
        letters_tokenizer().encode("REV hello SEP")


def test_a_saved_tokenizer_reloads_as_itself(tmp_path: Path) -> None:
    tokenizer = letters_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    reloaded = AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)
    text = "REV LEN a p SEP"
    assert reloaded.encode(text) == tokenizer.encode(text)
    assert reloaded.decode([37, 11, 1, 0], skip_special_tokens=True) == "please a"
    assert (reloaded.pad_token_id, reloaded.eos_token_id) == (0, 1)
    assert set(reloaded([text])) == {"input_ids", "attention_mask"}
