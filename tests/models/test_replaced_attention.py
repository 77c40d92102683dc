"""What a model can do is not touched by the attention that looks along trees."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel

from tests.models.families import PAIRS, WINDOW, family_model, family_reward
from tests.models.tiny import PAD, tiny_tokenizer
from tpmm_pl.data.batching import collate
from tpmm_pl.models.export import export_model
from tpmm_pl.models.reward import RewardScorer, export_reward_model
from tpmm_pl.models.scoring import PairScorer
from tpmm_pl.models.tree_attention import TreeMask

TREE = collate(PAIRS).tree
IDS = torch.tensor([[PAD, PAD, PAD, 5, 6, 7, 8], [9, 10, 11, 12, 13, 14, 15]])
MASK = (IDS != PAD).long()
BEHIND = torch.tensor([[9, 10, 11, 12, 13, 14, 15], [5, 6, 7, 8, PAD, PAD, PAD]])

some_families = pytest.mark.parametrize(
    ("family", "attention"),
    [
        ("Llama", "sdpa"),
        ("Llama", "eager"),
        ("Mistral", "sdpa"),
        ("Gemma2", "eager"),
        ("Gemma3Text", "sdpa"),
        ("GPT2", "sdpa"),
        ("GPT2", "eager"),
    ],
)


def with_scorer(model: PreTrainedModel) -> PreTrainedModel:
    assert PairScorer(model)._pass.packs
    return model


def replaced(model: PreTrainedModel) -> bool:
    return "token_tree" in str(model.config._attn_implementation)


@torch.no_grad()
def outputs(model: PreTrainedModel) -> list[Tensor]:
    """Return what a model computes and generates, with masks of all kinds."""
    anything: Any = model
    rows = anything(input_ids=IDS, attention_mask=MASK).logits
    behind = anything(input_ids=BEHIND, attention_mask=(BEHIND != PAD).long()).logits
    unmasked = anything(input_ids=IDS).logits
    length = IDS.shape[1]
    causal = torch.full((2, 1, length, length), -torch.inf).triu(1)
    own = anything(input_ids=IDS, attention_mask=causal).logits
    settings = {"attention_mask": MASK, "max_new_tokens": 2 * WINDOW, "do_sample": False}
    plain = anything.generate(IDS, **settings)
    static = anything.generate(IDS, **settings, cache_implementation="static", disable_compile=True)
    assert torch.equal(plain, static)
    cacheless = anything.generate(IDS, **settings, use_cache=False)
    return [rows[MASK.bool()], behind, unmasked, own, plain, cacheless]


@some_families
def test_rows_masks_and_generation_are_as_before_bit_for_bit(family: str, attention: str) -> None:
    model = family_model(family, attention=attention)
    before = outputs(model)
    assert not replaced(model)
    with_scorer(model)
    assert replaced(model)
    for found, expected in zip(outputs(model), before, strict=True):
        assert torch.equal(found, expected)


def test_eager_attention_still_shows_its_weights() -> None:
    model = family_model("Llama", attention="eager")
    before = model(input_ids=IDS, output_attentions=True).attentions
    after = with_scorer(model)(input_ids=IDS, output_attentions=True).attentions
    assert len(after) == 2
    assert all(torch.equal(*both) for both in zip(after, before, strict=True))


def test_the_row_path_hands_over_what_dropout_needs() -> None:
    results = []
    for made in (False, True):
        model = family_model("Llama", attention_dropout=0.5)
        if made:
            with_scorer(model)
        torch.manual_seed(3)
        results.append(model.train()(input_ids=IDS).logits)
    assert torch.equal(*results)
    assert not torch.equal(results[0], model.eval()(input_ids=IDS).logits)


def test_dropout_drops_weights_in_trees_too() -> None:
    model = with_scorer(family_model("Llama", attention_dropout=0.5))
    scorer = PairScorer(model)
    first, second = scorer.rows(TREE), scorer.rows(TREE)
    model.train()
    dropped = scorer.rows(TREE)
    assert torch.equal(first, second)
    assert not torch.equal(first, dropped)


PLAIN = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
ids = torch.tensor(eval(sys.argv[1]))
for kind, folder in ((AutoModelForCausalLM, 2), (AutoModelForSequenceClassification, 3)):
    model = kind.from_pretrained(sys.argv[folder]).eval()
    with torch.no_grad():
        torch.save(model(input_ids=ids).logits, sys.argv[folder] + ".pt")
"""


def test_plain_transformers_reads_what_was_saved_and_its_config_names_no_attention_of_ours(
    tmp_path: Path,
) -> None:
    policy, reward = with_scorer(family_model("Llama")), family_reward("Llama")
    assert RewardScorer(reward).packs
    export_model(policy, tiny_tokenizer(), None, tmp_path / "policy")
    export_reward_model(reward, tiny_tokenizer(), tmp_path / "reward")
    policy.save_pretrained(tmp_path / "saved")
    for folder in ("policy", "reward", "saved"):
        config = json.loads((tmp_path / folder / "config.json").read_text())
        assert "token_tree" not in json.dumps(config), folder
    folders = [str(tmp_path / "saved"), str(tmp_path / "reward")]
    command = [sys.executable, "-c", PLAIN, str(BEHIND[:1].tolist()), *folders]
    subprocess.run(command, check=True, capture_output=True)
    for model, name in ((policy, "saved"), (reward, "reward")):
        with torch.no_grad():
            expected = model(input_ids=BEHIND[:1]).logits
        assert torch.equal(torch.load(tmp_path / f"{name}.pt"), expected)


def test_a_model_read_again_is_untouched(tmp_path: Path) -> None:
    model, reward = with_scorer(family_model("Llama")), family_reward("Llama")
    RewardScorer(reward)
    model.save_pretrained(tmp_path / "policy")
    reward.save_pretrained(tmp_path / "reward")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "policy")
    reward_again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "reward")
    for fresh in (again, reward_again, family_model("Llama")):
        assert fresh.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("copy", [deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_compute_and_score_the_same(copy: Any) -> None:
    model = family_model("Gemma2")
    scorer = PairScorer(model)
    other = copy(model)
    with torch.no_grad():
        assert torch.equal(other(input_ids=IDS).logits, model(input_ids=IDS).logits)
        again = PairScorer(other)
        assert again._pass.packs
        assert torch.equal(again.rows(TREE), scorer.rows(TREE))
        other.get_output_embeddings().weight.mul_(2)
        assert not torch.equal(again.rows(TREE), scorer.rows(TREE))


UNPICKLE = """
import pickle, sys, torch
from tests.models.test_replaced_attention import TREE
from tpmm_pl.models.scoring import PairScorer
model = pickle.load(open(sys.argv[1], "rb"))
with torch.no_grad():
    torch.save(PairScorer(model).rows(TREE), sys.argv[2])
"""


def test_a_pickled_model_scores_in_another_process(tmp_path: Path) -> None:
    model = family_model("Mistral")
    with torch.no_grad():
        expected = PairScorer(model).rows(TREE)
    (tmp_path / "model.pickle").write_bytes(pickle.dumps(model))
    files = [str(tmp_path / "model.pickle"), str(tmp_path / "rows")]
    command = [sys.executable, "-c", UNPICKLE, *files]
    subprocess.run(command, check=True, capture_output=True, cwd=Path(__file__).parents[2])
    assert torch.equal(torch.load(tmp_path / "rows"), expected)


def test_a_tree_without_its_mask_is_not_mistaken_for_rows() -> None:
    model = with_scorer(family_model("Llama"))
    inputs = {"input_ids": TREE.tokens[None], "position_ids": TREE.positions[None]}
    with torch.no_grad():
        along = model(**inputs, tree=TreeMask(TREE)).logits
        rows = model(**inputs).logits
    assert not torch.allclose(along, rows, atol=1e-2)
