from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.models.families import family_model
from tpmm_pl.data.packing import pack_rows
from tpmm_pl.models import tree_attention as attention
from tpmm_pl.models import tree_pass
from tpmm_pl.models.scoring import PairScorer
from tpmm_pl.models.tree_attention import Segment, TreeMask, segments, tree_attention
from tpmm_pl.types import TokenTree

#     0 - 1 - 2 - 3 - 4          a prompt of two, an answer of three,
#         |   `-- 5 - 6          one that parts from it behind a token,
#         `-- 7                  one of a single token,
#     8 - 9 - 10                 and a row of another prompt
TREE = pack_rows(
    [
        ((3, 4), (5, 6, 7)),
        ((3, 4), (5, 8, 9)),
        ((3, 4), (10,)),
        ((11,), (12, 13)),
        ((11,), (12,)),
    ]
)


def sees(tree: TokenTree, window: int | None = None) -> Tensor:
    """Return who sees whom, ``(T, T)``, from each token's parent: the one it stands behind."""
    count = len(tree.tokens)
    parents = [-1] * count
    for token in range(1, count):
        if tree.positions[token] > 0:
            before = (tree.positions[:token] == tree.positions[token] - 1).nonzero()
            parents[token] = int(before[-1])
    matrix = torch.zeros(count, count, dtype=torch.bool)
    for token in range(count):
        ancestor, distance = token, 0
        while ancestor >= 0 and (window is None or distance < window):
            matrix[token, ancestor] = True
            ancestor, distance = parents[ancestor], distance + 1
    return matrix


@pytest.fixture
def apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep every chain in a segment of its own."""
    monkeypatch.setattr(attention, "SEGMENT", 1)


@pytest.mark.usefixtures("apart")
def test_a_tree_is_cut_where_a_token_has_no_child_behind_it() -> None:
    assert TREE.tokens.tolist() == [3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13]
    assert TREE.ends.tolist() == [8, 8, 7, 5, 5, 7, 7, 8, 11, 11, 11]
    assert segments(TREE.ends.numpy(), 1) == [
        Segment((0, 5), ()),
        Segment((5, 7), ((0, 3),)),
        Segment((7, 8), ((0, 2),)),
        Segment((8, 11), ()),
    ]
    mask = TreeMask(TREE)
    assert mask.sizes == [2, 1, 2, 2, 1, 3]
    assert mask.seen == [[0, 1, 2], [0, 1, 3], [0, 4], [5]]


@pytest.mark.parametrize(
    ("longest", "spans"),
    [
        (2, [(0, 5), (5, 7), (7, 8), (8, 11)]),
        (3, [(0, 5), (5, 8), (8, 11)]),
        (7, [(0, 7), (7, 11)]),
        (8, [(0, 8), (8, 11)]),
        (11, [(0, 11)]),
    ],
)
def test_short_chains_share_a_segment(longest: int, spans: list[tuple[int, int]]) -> None:
    found = segments(TREE.ends.numpy(), longest)
    assert [one.span for one in found] == spans
    assert segments(TREE.ends.numpy(), 3)[1] == Segment((5, 8), ((0, 3),))


def test_a_context_of_several_spans_keeps_the_order_of_positions() -> None:
    # 0 - 1 - 2
    #     `-- 3 - 4
    #         `-- 5
    ends = np.array([6, 6, 3, 6, 5, 6])
    assert [chain.seen for chain in segments(ends, 1)] == [
        ((0, 3),),
        ((0, 2), (3, 5)),
        ((0, 2), (3, 4), (5, 6)),
    ]


def test_who_sees_whom_by_hand() -> None:
    seen = [row.nonzero()[:, 0].tolist() for row in sees(TREE)]
    assert seen[4] == [0, 1, 2, 3, 4]
    assert seen[6] == [0, 1, 2, 5, 6]
    assert seen[7] == [0, 1, 7]
    assert seen[10] == [8, 9, 10]
    narrow = [row.nonzero()[:, 0].tolist() for row in sees(TREE, 2)]
    assert (narrow[0], narrow[5], narrow[7]) == ([0], [2, 5], [1, 7])


rows_of_tokens = st.lists(
    st.tuples(
        st.lists(st.integers(0, 2), max_size=5).map(tuple),
        st.lists(st.integers(0, 2), min_size=1, max_size=5).map(tuple),
    ),
    min_size=1,
    max_size=6,
)
windows = st.none() | st.integers(1, 6)


@given(rows_of_tokens, windows, st.sampled_from([1, 4, 8, 128]))
@settings(deadline=None, max_examples=40)
def test_the_masks_of_segments_and_of_blocks_are_the_matrix_of_ancestors(
    rows: list[tuple[tuple[int, ...], tuple[int, ...]]], window: int | None, longest: int
) -> None:
    tree = pack_rows(rows)
    mask, expected = TreeMask(tree), sees(tree, window)
    with mock.patch.object(attention, "SEGMENT", longest):
        assert mask.segments == segments(tree.ends.numpy(), longest)
    found = torch.zeros_like(expected)
    for number, one in enumerate(mask.segments):
        here = range(*one.span)
        seen = [token for span in one.seen for token in range(*span)]
        added = mask.of_segment(number, window, torch.zeros(()))
        if added is None:
            added = torch.full((len(here), len(seen)), -torch.inf).triu(1)
        assert set(added.unique().tolist()) <= {0.0, -torch.inf}
        found[here.start : here.stop, seen] = added == 0
    assert torch.equal(found, expected)
    counted = torch.arange(len(tree.tokens))
    rule = mask.blocks(window).mask_mod
    none = torch.zeros((), dtype=torch.long)
    assert torch.equal(rule(none, none, counted[:, None], counted[None]), expected)


def dense(
    inputs: Sequence[Tensor], hidden: Tensor, scale: float | None, softcap: float | None
) -> Tensor:
    """Return the softmax over all tokens but those hidden, head by head."""
    query, key, value = inputs
    groups = query.shape[1] // key.shape[1]
    heads = []
    for head in range(query.shape[1]):
        q, k, v = query[0, head], key[0, head // groups], value[0, head // groups]
        scores = (q @ k.T) * (q.shape[-1] ** -0.5 if scale is None else scale)
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        heads.append(scores.masked_fill(hidden, -torch.inf).softmax(-1) @ v)
    return torch.stack(heads, dim=1)[None]


def projections(heads: int, of_keys: int, width: int = 4) -> list[Tensor]:
    generator = torch.Generator().manual_seed(heads + of_keys)
    count = len(TREE.tokens)
    shapes = [(1, heads, count, width), (1, of_keys, count, width), (1, of_keys, count, width + 2)]
    return [
        (2 * torch.randn(shape, generator=generator, dtype=torch.float64)).requires_grad_()
        for shape in shapes
    ]


def attend(inputs: Sequence[Tensor], **settings: Any) -> Tensor:
    query, key, value = inputs
    found, weights = tree_attention(
        nn.Identity(), query, key, value, None, otherwise="sdpa", tree=TreeMask(TREE), **settings
    )
    assert weights is None
    return found


@pytest.mark.parametrize("longest", [1, 4, 128])
@pytest.mark.parametrize("window", [None, 1, 3])
@pytest.mark.parametrize(("softcap", "scale"), [(None, None), (None, 0.7), (1.5, 0.7)])
@pytest.mark.parametrize(("heads", "of_keys"), [(2, 2), (4, 2)])
def test_values_and_gradients_are_those_of_a_dense_masked_softmax(
    heads: int,
    of_keys: int,
    softcap: float | None,
    scale: float | None,
    window: int | None,
    longest: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(attention, "SEGMENT", longest)
    inputs = projections(heads, of_keys)
    found = attend(inputs, scaling=scale, sliding_window=window, softcap=softcap)
    expected = dense(inputs, ~sees(TREE, window), scale, softcap)
    torch.testing.assert_close(found, expected, atol=1e-10, rtol=0)
    assert found.is_contiguous()
    into = torch.randn(found.shape, generator=torch.Generator().manual_seed(1), dtype=found.dtype)
    for ours, theirs in zip(
        torch.autograd.grad(found, inputs, into), torch.autograd.grad(expected, inputs, into),
        strict=True,
    ):  # fmt: skip
        assert theirs.abs().max() > 0.1 or window == 1
        torch.testing.assert_close(ours, theirs, atol=1e-10, rtol=0)


def test_gradients_can_be_asked_for_twice() -> None:
    inputs = projections(4, 2)
    found = attend(inputs)
    first = torch.autograd.grad(found.sum(), inputs, retain_graph=True)
    second = torch.autograd.grad(found.sum(), inputs)
    assert all(torch.equal(*both) for both in zip(first, second, strict=True))


def test_rows_without_a_tree_go_to_the_models_own_attention(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: dict[str, Any] = {}

    def own(module: nn.Module, *inputs: Any, **settings: Any) -> tuple[Tensor, None]:
        seen.update(settings, inputs=inputs)
        return torch.zeros(()), None

    monkeypatch.setattr(attention, "_attention", lambda name, module: own)
    query, key, value = projections(2, 2)
    given: dict[str, Any] = {"scaling": 0.5, "dropout": 0.1, "sliding_window": 3, "other": 7}
    tree_attention(nn.Identity(), query, key, value, "mask", otherwise="sdpa", **given)
    assert seen.pop("inputs")[3] == "mask"
    assert seen == given


@pytest.mark.parametrize("name", ["s_aux", "position_bias"])
def test_what_a_tree_has_no_form_of_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"attention with {name} has no form for token trees"):
        attend(projections(2, 2), **{name: torch.zeros(2)})


@pytest.mark.usefixtures("apart")
@pytest.mark.parametrize("checkpointed", [False, True])
def test_attention_is_called_once_a_chain_and_layer(
    checkpointed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = family_model("Llama")
    scorer = PairScorer(model)
    if checkpointed:
        model.train().gradient_checkpointing_enable()
    calls: list[tuple[int, int]] = []
    attend = F.scaled_dot_product_attention

    def counted(query: Tensor, key: Tensor, *others: Any, **options: Any) -> Tensor:
        calls.append((query.shape[2], key.shape[2]))
        return attend(query, key, *others, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", counted)
    loss = scorer.rows(TREE).sum()
    of_layer = [(5, 5), (2, 5), (1, 3), (3, 3)]
    assert calls == 2 * of_layer
    loss.backward()
    assert calls == (4 if checkpointed else 2) * of_layer


@pytest.mark.usefixtures("apart")
def test_masks_are_made_once_for_all_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    scorer, mask = PairScorer(family_model("Gemma3Text")), TreeMask(TREE)
    masks = iter([mask])
    monkeypatch.setattr(tree_pass, "TreeMask", lambda tree: next(masks))
    scorer.rows(TREE)
    # one a chain and kind of layer; the window of 5 holds the rows of 5 and less
    assert {key[:2] for key in mask._masks} == {(n, w) for n in range(4) for w in (None, 5)}


@pytest.mark.gpu
@pytest.mark.parametrize("family", ["Llama", "Mistral", "Gemma2", "GPT2"])
def test_on_cuda_a_tree_gives_what_padded_rows_give(family: str) -> None:
    results = []
    for packs in (True, False):
        # the kernel takes heads of 16 and more
        wide: dict[str, Any] = {"n_embd": 64} if family == "GPT2" else {"hidden_size": 64}
        wide |= {"head_dim": 16} if family == "Gemma2" else {}
        model = family_model(family, **wide, initializer_range=0.1)
        model.to("cuda")  # type: ignore[arg-type]
        scorer = PairScorer(model)
        assert scorer._pass.packs
        scorer._pass.packs = packs
        rows = scorer.rows(TREE.to(torch.device("cuda")))
        rows.square().mean().backward()
        gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        results.append((rows.detach(), gradient))
    (ours, of_ours), (expected, of_expected) = results
    torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-4)
    assert (of_ours - of_expected).norm() < 1e-3 * of_expected.norm()


class OnCuda(Tensor):
    is_cuda = True


def test_the_kernel_of_cuda_gets_one_dtype_under_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.dtype] = []

    def kernel(_: object, *inputs: Tensor, **__: object) -> None:
        seen.extend(tensor.dtype for tensor in inputs[:3])

    monkeypatch.setattr(attention, "flex_attention_forward", kernel)
    query = torch.randn(1, 1, len(TREE.tokens), 2).as_subclass(OnCuda)
    mask = TreeMask(TREE)
    tree_attention(nn.Identity(), query, query, query.bfloat16(), None, otherwise="sdpa", tree=mask)
    assert seen == [torch.bfloat16] * 3
