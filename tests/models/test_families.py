from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import Tensor

from tests.models.families import (
    CONFIGS,
    PAIRS,
    WINDOW,
    alone,
    distance,
    family_model,
    gradient_of,
    preference_gradient,
    relative,
    scorers,
)
from tpmm_pl.data.batching import collate
from tpmm_pl.data.packing import Ids, pack_rows, pair_rows
from tpmm_pl.models.scoring import PairScorer
from tpmm_pl.models.tree_attention import TreeMask

ROWS = pair_rows(PAIRS)
TREE = collate(PAIRS).tree
every_family = pytest.mark.parametrize("family", CONFIGS)
some_families = pytest.mark.parametrize("family", ["Llama", "GPT2", "Gemma2", "Gemma3Text"])


def test_the_rows_share_what_they_are_to_share() -> None:
    assert sum(len(prompt) + len(ids) for prompt, ids in ROWS) == 120
    assert len(TREE.tokens) == 43
    assert len(TREE.states) < len(TREE.targets)
    # of one row the leaf is inside of another
    assert (TREE.ends[TREE.leaves] > TREE.leaves + 1).sum() == 1


@every_family
@pytest.mark.parametrize("attention", [None, "eager"])
def test_packed_rows_are_padded_rows_and_each_alone(family: str, attention: str | None) -> None:
    model = family_model(family, attention=attention)
    packed, padded = (scorer.rows(TREE) for scorer in scorers(model))
    expected = alone(model, ROWS)
    assert expected.std() > 1
    assert distance(packed, padded) < 5e-6
    assert distance(packed, expected) < 5e-6
    ours, of_padded, of_alone = (
        preference_gradient(model, rows) for rows in (packed, padded, expected)
    )
    assert relative(ours, of_padded) < 1e-5
    assert relative(ours, of_alone) < 1e-5


@every_family
def test_a_wrong_mask_would_show(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = family_model(family)
    packed, _ = scorers(model)
    of_segment = TreeMask.of_segment

    def blurred(self: TreeMask, number: int, window: int | None, like: Tensor) -> Tensor | None:
        # each token of a second branch sees the one behind it, too
        mask = of_segment(self, number, window, like)
        return mask if mask is None or len(mask) < 2 else mask.roll(-1, 0)

    with torch.no_grad():
        right = packed.rows(TREE)
        monkeypatch.setattr(TreeMask, "of_segment", blurred)
        assert distance(packed.rows(TREE), right) > 1e-3
        monkeypatch.setattr(TreeMask, "of_segment", lambda *a: of_segment(a[0], a[1], None, a[3]))
        windowless = distance(packed.rows(TREE), right)
    assert windowless > 1e-3 if "sliding_window" in CONFIGS[family] else windowless == 0


@every_family
def test_a_reference_is_the_policy_at_first(family: str) -> None:
    with torch.no_grad():
        first, second = (PairScorer(family_model(family)).rows(TREE) for _ in range(2))
    assert torch.equal(first, second)


@every_family
def test_a_model_in_double_precision_gives_the_same_in_both_layouts(family: str) -> None:
    model = family_model(family).double()
    packed, padded = (scorer.tokens(TREE) for scorer in scorers(model))
    # log-probabilities of tokens are float32
    assert distance(packed, padded) < 5e-7
    weights = torch.linspace(-1, 1, len(packed))
    assert relative(*(gradient_of(model, weights @ values) for values in (packed, padded))) < 1e-6


@every_family
def test_under_bf16_autocast_both_layouts_are_equally_near_to_float32(family: str) -> None:
    model = family_model(family)
    packed, padded = scorers(model)
    exact = packed.rows(TREE)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours, theirs = packed.rows(TREE), padded.rows(TREE)
    assert distance(ours, theirs) < 5e-3
    assert distance(ours, exact) < 1e-2
    expected, of_ours, of_theirs = (
        preference_gradient(model, rows) for rows in (exact, ours, theirs)
    )
    assert relative(of_ours, of_theirs) < 2e-2
    assert relative(of_ours, expected) < 1.2 * relative(of_theirs, expected) < 0.1


@every_family
def test_checkpointed_activations_give_the_same_gradients(family: str) -> None:
    model = family_model(family)
    packed, _ = scorers(model)
    expected = preference_gradient(model, packed.rows(TREE))
    model.train().gradient_checkpointing_enable()
    assert relative(preference_gradient(model, packed.rows(TREE)), expected) < 1e-6


@some_families
@pytest.mark.parametrize("checkpointed", [False, True])
def test_adapters_get_the_gradients_of_padded_rows(family: str, checkpointed: bool) -> None:
    torch.manual_seed(1)
    lora = LoraConfig(
        r=3, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM"
    )
    model: Any = get_peft_model(family_model(family), lora)
    if checkpointed:
        model.enable_input_require_grads()
        model.train().gradient_checkpointing_enable()
    packed, padded = (scorer.rows(TREE) for scorer in scorers(model))
    expected = alone(model, ROWS)
    assert distance(packed, padded) < 5e-6
    assert distance(packed, expected) < 5e-6
    with model.disable_adapter():
        assert distance(packed, alone(model, ROWS)) > 0.1
    ours, theirs = (preference_gradient(model, rows) for rows in (packed, expected))
    assert relative(ours, theirs) < 1e-5


ids = st.lists(st.integers(1, 4), max_size=2 * WINDOW).map(tuple)
random_rows = st.lists(st.tuples(ids.filter(bool), ids.filter(bool)), min_size=1, max_size=6)
MODELS = {family: family_model(family) for family in ("Llama", "Gemma2", "Gemma3Text")}


@pytest.mark.parametrize("family", MODELS)
@given(rows=random_rows, order=st.randoms(use_true_random=False))
@settings(deadline=None, max_examples=15)
def test_any_tree_gives_what_its_rows_give(
    family: str, rows: list[tuple[Ids, Ids]], order: Any
) -> None:
    packed, padded = scorers(MODELS[family])
    with torch.no_grad():
        scores = packed.rows(pack_rows(rows))
        assert distance(scores, padded.rows(pack_rows(rows))) < 5e-6
        assert distance(scores, alone(MODELS[family], rows)) < 5e-6
        mixed = order.sample(range(len(rows)), len(rows))
        again = packed.rows(pack_rows([rows[row] for row in mixed]))
    assert distance(again, scores[mixed]) < 5e-6
