"""Rows of every shape, for tokenizers of every kind: the same tokens, labels and special tokens."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.data.tokens.byte_level import ADDS, BOS_ID, EOS_ID, TEMPLATES, byte_tokenizer, decoded
from tests.models.tiny import EOS, PAD, tiny_tokenizer
from tpmm_pl.data.batching import collate
from tpmm_pl.data.packing import pad_tree
from tpmm_pl.data.rows.formats import RawPair, preferences
from tpmm_pl.data.rows.report import DataReport
from tpmm_pl.data.rows.sources import DataSource
from tpmm_pl.data.tokens.chat import tokenize_pairs, tokenize_prompts
from tpmm_pl.types import IGNORE_INDEX, TokenTree


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


SYSTEM, USER, W1_W2, W3 = (
    turn("system", "w9"),
    turn("user", "w0"),
    turn("assistant", "w1 w2"),
    turn("assistant", "w3"),
)
PROMPT = "<system> w9 <eos> <user> w0 <eos> <assistant>"
SHAPES: dict[str, dict[str, Any]] = {
    "plain": {"prompt": PROMPT, "chosen": "w1 w2", "rejected": "w3"},
    "plain, implicit prompt": {"chosen": f"{PROMPT} w1 w2", "rejected": f"{PROMPT} w3"},
    "conversation": {"prompt": [SYSTEM, USER], "chosen": [W1_W2], "rejected": [W3]},
    "conversation, repeated in the answers": {
        "prompt": [SYSTEM, USER],
        "chosen": [SYSTEM, USER, W1_W2],
        "rejected": [SYSTEM, USER, W3],
    },
    "conversation, implicit prompt": {
        "chosen": [SYSTEM, USER, W1_W2],
        "rejected": [SYSTEM, USER, W3],
    },
    "conversation, single turns": {"prompt": [SYSTEM, USER], "chosen": W1_W2, "rejected": W3},
    "conversation, system apart": {
        "system": "w9",
        "prompt": [USER],
        "chosen": [W1_W2],
        "rejected": [W3],
    },
    "ShareGPT": {
        "prompt": [{"from": "system", "value": "w9"}, {"from": "human", "value": "w0"}],
        "chosen": {"from": "gpt", "value": "w1 w2"},
        "rejected": {"from": "gpt", "value": "w3"},
    },
    "HH text": {
        "system": "w9",
        "chosen": "\n\nHuman: w0\n\nAssistant: w1 w2",
        "rejected": "\n\nHuman: w0\n\nAssistant: w3",
    },
    "ranking": {
        "prompt": [SYSTEM, USER],
        "responses": [[W3], [turn("assistant", "w4")], [W1_W2]],
        "scores": [0.5, 0.75, 1.0],
    },
    "ranking, plain": {
        "prompt": PROMPT,
        "responses": ["w1 w2", "w3"],
        "ranks": [1, 2],
    },
    "tokens": {
        "prompt_ids": [5, 15, EOS, 3, 6, EOS, 4],
        "chosen_ids": [7, 8, EOS],
        "rejected_ids": [9, EOS],
    },
}


def labels(tree: TokenTree, ids: Tensor) -> Tensor:
    """The scored tokens at their places in the padded rows."""
    found = torch.full_like(ids, IGNORE_INDEX)
    found[tree.row_of, tree.positions[tree.states[tree.state_of]] + 1] = tree.targets
    return found


@pytest.mark.parametrize("shape", SHAPES)
def test_rows_of_every_shape_become_the_same_batch(shape: str, tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text(json.dumps(SHAPES[shape]))
    rows = list(preferences(DataSource(str(path)), DataReport()))
    pairs, counts = tokenize_pairs(rows, tiny_tokenizer(), max_length=20)
    assert not counts
    batch = collate(pairs)
    ids, mask = pad_tree(batch.tree, PAD)
    assert ids.tolist() == [
        [5, 15, EOS, 3, 6, EOS, 4, 7, 8, EOS],
        [5, 15, EOS, 3, 6, EOS, 4, 9, EOS, PAD],
    ]
    assert mask.tolist() == [[1] * 10, [1] * 9 + [0]]
    assert labels(batch.tree, ids).tolist() == [
        [IGNORE_INDEX] * 7 + [7, 8, EOS],
        [IGNORE_INDEX] * 7 + [9, EOS, IGNORE_INDEX],
    ]
    assert batch.weight.tolist() == [1.0]


CONVERSATION = (
    (turn("system", "the"), turn("user", " hi\n")),
    (turn("assistant", "\nhello "),),
    (turn("assistant", "the"),),
)


@pytest.mark.parametrize("adds", ADDS)
@pytest.mark.parametrize("template", TEMPLATES)
def test_beginning_and_end_come_once_for_every_kind_of_tokenizer(adds: str, template: str) -> None:
    tokenizer = byte_tokenizer(adds, TEMPLATES[template])
    prompt, chosen, rejected = CONVERSATION
    rows = [
        RawPair(prompt, "", chosen, rejected),
        RawPair(prompt[1:], "", chosen, rejected),
        RawPair("hi", "", "hello", " the"),
        RawPair("<bos>hi", "", "hello<end>", " the<end>"),
    ]
    pairs, _ = tokenize_pairs(rows, tokenizer, max_length=200)
    begins = [template == "its own beginning"] * 2 + [adds in ("its beginning", "both"), True]
    for pair, begin in zip(pairs, begins, strict=True):
        assert pair.prompt_ids.count(BOS_ID) == begin
        assert pair.prompt_ids[0] == BOS_ID or not begin
        for completion, text in ((pair.chosen_ids, "hello"), (pair.rejected_ids, "the")):
            assert completion.count(BOS_ID) == 0
            assert completion.count(EOS_ID) == 1
            assert completion[-1] == EOS_ID
            assert decoded(completion[:-1]).strip() == text
    turns = [2, 2 if template == "a default system prompt" else 1]
    ends = [pair.prompt_ids.count(EOS_ID) for pair in pairs[:2]]
    assert ends == ([0, 0] if template == "no end of a turn" else turns)
    assert decoded(pairs[2].prompt_ids).removeprefix("<bos>") == "hi"


def test_many_rows_of_all_kinds_become_what_each_becomes_alone() -> None:
    tokenizer = byte_tokenizer("both", TEMPLATES["its own beginning"])
    rows = []
    for number in range(0, 600, 3):
        asked = (turn("user", f"{number}"),)
        rows += [
            RawPair(asked, "", (turn("assistant", "a"),), (turn("assistant", "\n" * number),)),
            RawPair(f"{number}", "", "a", f"{number}"),
            RawPair("", "", ids=((9, 10 + number % 200), (7,), (8,))),
        ]
    together, counts = tokenize_pairs(rows, tokenizer, max_length=1000)
    alone = [tokenize_pairs([row], tokenizer, max_length=1000) for row in rows]
    assert list(map(str, together)) == [str(pair) for pairs, _ in alone for pair in pairs]
    assert sum((count for _, count in alone), start=Counter[str]()) == counts
    assert len(together) > 512, "more than one call of the tokenizer"
    prompts = tokenize_prompts([row for row in rows if row.ids is None], tokenizer, 1000)
    of_texts = [pair for pair in together if pair.prompt_ids[0] != 9]
    assert [(prompt.prompt_id, prompt.ids) for prompt in prompts] == [
        (pair.prompt_id, pair.prompt_ids) for pair in of_texts
    ]
