from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, PreTrainedModel

from tests.models.families import COMMON, GROUPED, alone, family_model, family_reward
from tests.models.tiny import EOS, tiny_bert
from tpmm_pl.data.packing import Ids, pack_rows, pad_tree
from tpmm_pl.models import tree_pass
from tpmm_pl.models.reward import RewardScorer
from tpmm_pl.models.scoring import PairScorer
from tpmm_pl.models.tree_pass import length_groups
from tpmm_pl.types import TokenTree

PROMPT = (3, 4, 5, 6, 7, 8)
ROWS: list[tuple[Ids, Ids]] = [
    (PROMPT, (9, 10, 11, EOS)),
    (PROMPT, (9, 12, EOS)),
    ((*PROMPT[:3], 20, 21), (22, 23, 24, 25, 26, 27, 28, EOS)),
    ((*PROMPT[:3], 20, 21), (22, 23)),
]
"""22 distinct tokens, 6 + 4 + 2 of the first prompt and 2 + 8 + 0 of the second; 13 predict."""
TREE = pack_rows(ROWS)


def near(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found.double(), expected, atol=1e-6, rtol=5e-6)


# what has no form as a tree, and why; windows that the probe's short rows could not show
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "Mamba": (
        COMMON | {"hidden_size": 16, "num_hidden_layers": 2, "state_size": 4},
        "its attention cannot be replaced",
    ),
    "Bloom": (
        COMMON | {"hidden_size": 16, "n_layer": 2, "n_head": 4},
        "its attention cannot be replaced",
    ),
    "Llama4Text": (
        GROUPED | {"head_dim": 8, "attention_chunk_size": 4, "num_local_experts": 2}
        | {"intermediate_size_mlp": 32},
        "its attention cannot be replaced",
    ),
    "GptOss": (
        GROUPED | {"head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2}
        | {"rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0}},
        "attention with s_aux has no form for token trees",
    ),
    "Phimoe": (
        GROUPED | {"num_local_experts": 4, "sliding_window": 100},
        "attention with a window in its mask only has no form for token trees",
    ),
}  # fmt: skip


def refused(family: str) -> PreTrainedModel:
    settings = REFUSED[family][0] | {"initializer_range": 0.3}
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**settings)
    return cast(PreTrainedModel, AutoModelForCausalLM.from_config(config).eval())


@pytest.mark.parametrize("family", REFUSED)
def test_a_model_without_trees_is_scored_in_padded_rows_and_one_line_says_why(
    family: str, capsys: pytest.CaptureFixture[str]
) -> None:
    model = refused(family)
    capsys.readouterr()
    scorers = [PairScorer(model) for _ in range(3)]
    said = capsys.readouterr()
    assert said.out == ""
    lines = [line for line in said.err.splitlines() if "[transformers]" not in line]
    name, reason = type(model).__name__, REFUSED[family][1]
    assert lines == [f"{name} cannot be packed as a token tree ({reason}); its batches are padded"]
    assert not any(scorer._pass.packs for scorer in scorers)
    with torch.no_grad():
        near(scorers[-1].rows(TREE), alone(model, ROWS))


def test_a_model_that_can_be_packed_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert PairScorer(family_model("Llama"))._pass.packs
    assert RewardScorer(family_reward("Llama")).packs
    assert capsys.readouterr() == ("", "")


def test_an_encoder_is_scored_in_padded_rows_and_one_line_says_so(
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = tiny_bert().eval()
    scorers = [RewardScorer(model) for _ in range(2)]
    (line,) = capsys.readouterr().err.splitlines()
    assert line == (
        "BertForSequenceClassification cannot be packed as a token tree (it is no decoder with a"
        " linear head); its batches are padded"
    )
    with torch.no_grad():
        rows = [torch.tensor([[*prompt, *ids]]) for prompt, ids in ROWS]
        expected = torch.cat([model(input_ids=row).logits[:, 0] for row in rows])
        torch.testing.assert_close(scorers[0].rows(TREE), expected, atol=1e-6, rtol=0)


def test_a_tree_that_gives_something_else_than_rows_is_noticed() -> None:
    model = family_model("Llama")
    # a state that runs on from token to token, whatever the attention
    mlp = cast(Any, model).model.layers[0].mlp
    mlp.register_forward_hook(lambda _, __, output: output + 0.01 * output.cumsum(1))
    scorer = PairScorer(model)
    assert not scorer._pass.packs
    with torch.no_grad():
        near(scorer.rows(TREE), alone(model, ROWS))


def test_an_attention_chosen_after_the_scorer_was_made_sees_the_tree_too() -> None:
    model = family_model("Mistral")
    scorer, expected = PairScorer(model), alone(model, ROWS).detach()
    for name in ("eager", "sdpa"):
        model.set_attn_implementation(name)
        with torch.no_grad():
            near(scorer.rows(TREE), expected)
            near(alone(model, ROWS), expected)


@contextmanager
def counted_tokens(model: nn.Module) -> Iterator[dict[str, int]]:
    """Count the tokens that go through each linear layer."""
    counts: dict[str, int] = {}

    def note(name: str, inputs: tuple[Tensor, ...]) -> None:
        counts[name] = counts.get(name, 0) + inputs[0].shape[:-1].numel()

    hooks = [
        module.register_forward_pre_hook(lambda _, inputs, name=name: note(name, inputs))
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    ]
    yield counts
    for hook in hooks:
        hook.remove()


def distinct(rows: Sequence[tuple[Ids, Ids]]) -> set[tuple[int, ...]]:
    """Return the beginnings of the rows: one a token of the tree."""
    whole = [(*prompt, *ids) for prompt, ids in rows]
    return {row[: end + 1] for row in whole for end in range(len(row))}


def test_every_distinct_token_goes_through_the_layers_once() -> None:
    model = family_model("Llama")
    scorer = PairScorer(model)
    tokens, states = len(distinct(ROWS)), len(TREE.states)
    assert tokens == len(TREE.tokens) == 22
    assert states == 13
    with counted_tokens(model) as counts:
        scorer.rows(TREE)
    last = {name: count for name, count in counts.items() if "layers.1.mlp" in name}
    others = {name: count for name, count in counts.items() if name not in last}
    assert len(last) == 3
    assert len(others) == 3 + 2 * 4
    assert set(others.values()) == {tokens}
    # nothing reads the other tokens behind the last attention
    assert set(last.values()) == {states}


def linear_operations(counts: Any) -> int:
    return int(sum(n for op, n in counts["Global"].items() if str(op) in ("aten.mm", "aten.addmm")))


def test_the_operations_of_a_packed_batch_are_those_of_its_distinct_tokens() -> None:
    model = family_model("Llama")
    scorer = PairScorer(model)
    with FlopCounterMode(display=False) as counter:
        loss = scorer.rows(TREE).sum()
    forward = linear_operations(counter.get_flop_counts())
    tokens, states = len(TREE.tokens), len(TREE.states)
    sizes = {name: p.numel() for name, p in model.named_parameters() if p.ndim == 2}
    head = sizes.pop("lm_head.weight")
    sizes.pop("model.embed_tokens.weight")
    last = sum(size for name, size in sizes.items() if "layers.1.mlp" in name)
    assert forward == 2 * tokens * (sum(sizes.values()) - last) + 2 * states * (last + head)
    with FlopCounterMode(display=False) as counter:
        loss.backward()
    # by the input and by the weight
    assert linear_operations(counter.get_flop_counts()) == 2 * forward


def test_checkpointed_blocks_compute_again_once() -> None:
    model = family_model("Llama")
    model.gradient_checkpointing_enable()
    scorer = PairScorer(model.train())
    with counted_tokens(model) as counts:
        loss = scorer.rows(TREE).sum()
        assert set(counts.values()) == {len(TREE.tokens)}
        loss.backward()
    # the last linear layer of a block needs not be made again for the gradients
    again = {count for name, count in counts.items() if "down_proj" not in name}
    assert again == {2 * len(TREE.tokens)}


def mask_of(lengths: Sequence[int]) -> Tensor:
    return (torch.arange(max(lengths))[None] < torch.tensor(lengths)[:, None]).long()


@pytest.mark.parametrize(
    "lengths", [[5], [3, 9], [4, 4, 4, 4], [1, 2, 3, 4, 50], [9, 1, 8, 2, 7, 3, 6, 4, 5], [30, 1]]
)
def test_length_groups_hold_every_row_once_and_whole(lengths: list[int]) -> None:
    groups = length_groups(mask_of(lengths))
    rows = torch.cat([rows for rows, _ in groups]).tolist()
    assert sorted(rows) == list(range(len(lengths)))
    for members, width in groups:
        assert width == max(lengths[row] for row in members.tolist())


def test_rows_of_one_length_stay_one_group_and_others_are_cut() -> None:
    assert len(length_groups(mask_of([7] * 8))) == 1
    assert len(length_groups(mask_of([1, 1, 1, 1, 1, 1, 50, 50]))) == 4


UNEVEN = pack_rows([((3,), (4,) * 20), ((5, 6), (7,)), ((8, 9, 10), (11, EOS)), ((12,), (13, 14))])


def padded_scorer(family: str = "Llama") -> PairScorer:
    scorer = PairScorer(family_model(family))
    scorer._pass.packs = False
    return scorer


@torch.no_grad()
def test_scores_come_in_the_order_of_the_rows_when_they_are_cut_into_groups(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    scorer = padded_scorer()
    assert len(length_groups(pad_tree(UNEVEN)[1])) > 1
    cut = scorer.rows(UNEVEN)
    monkeypatch.setattr(
        tree_pass, "length_groups", lambda mask: [(torch.arange(len(mask)), mask.shape[1])]
    )
    torch.testing.assert_close(cut, scorer.rows(UNEVEN), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_what_fills_the_padded_rows_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    one = padded_scorer().rows(UNEVEN)
    monkeypatch.setattr(tree_pass, "pad_tree", lambda tree: pad_tree(tree, 17))
    assert torch.equal(one, padded_scorer().rows(UNEVEN))


def test_a_moved_tree_is_the_same_tree() -> None:
    moved = TREE.to(torch.device("meta"))
    assert {tensor.device for tensor in moved} == {torch.device("meta")}
    back = TREE.to(torch.device("cpu"))
    assert isinstance(back, TokenTree)
    assert all(torch.equal(*both) for both in zip(back, TREE, strict=True))


@pytest.mark.parametrize("family", ["Llama", "Mistral", "GPT2"])
def test_a_model_is_tried_out_in_its_own_precision_whatever_autocast_is_on(family: str) -> None:
    model = family_model(family, initializer_range=0.5)
    with torch.autocast("cpu", torch.bfloat16):
        assert PairScorer(model)._pass.packs
