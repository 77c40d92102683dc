"""Merges of task vectors, piece by piece, against peft's own of whole tensors."""

from __future__ import annotations

import pytest
import torch
from peft.utils.merge_utils import ties
from torch import Tensor

from tpmm_pl.commands.merging import task_vectors
from tpmm_pl.commands.merging.task_vectors import dare_merge, ties_merge


@pytest.fixture(autouse=True)
def _several_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(task_vectors, "CHUNK", 17)


def drawn(count: int = 3) -> tuple[Tensor, list[Tensor]]:
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(6, 10, generator=generator)
    return base, [base + torch.randn(6, 10, generator=generator) for _ in range(count)]


@pytest.mark.parametrize("density", [0.01, 0.2, 0.75, 1.0])
def test_ties_in_pieces_is_peft_on_the_whole(density: float) -> None:
    base, tensors = drawn()
    weights = [1.0, 0.5, 2.0]
    out = torch.empty_like(base)
    ties_merge(base, tensors, weights, density, out)
    # peft keeps none of 60 at 1 %, the paper's share of a tensor is never empty
    kept = max(density, 1 / 60)
    expected = base + ties([t - base for t in tensors], torch.tensor(weights), kept)
    torch.testing.assert_close(out, expected, atol=1e-6, rtol=0)


def test_ties_worked_by_hand() -> None:
    # of 4 entries 2 are kept: 4 -3, 5 1 (4th place), -2 -6; signs elected: + - + -
    base = torch.tensor([1.0, 1.0, 1.0, 1.0])
    vectors = torch.tensor([[4.0, -3.0, 0.1, 0.2], [5.0, 0.1, 0.2, 1.0], [0.3, -2.0, 0.1, -6.0]])
    out = torch.empty(4)
    ties_merge(base, list(base + vectors), [1.0, 1.0, 1.0], 0.5, out)
    # means of 4 and 5, of -3 and -2, nothing, -6 alone since 1 - 6 < 0
    torch.testing.assert_close(out, torch.tensor([5.5, -1.5, 1.0, -5.0]), atol=1e-6, rtol=0)


def test_dare_of_density_1_is_task_arithmetic() -> None:
    base, tensors = drawn()
    out = torch.empty_like(base)
    dare_merge(base, tensors, [0.5, 0.25, -1.0], 1.0, out)
    expected = base + sum(w * (t - base) for w, t in zip([0.5, 0.25, -1.0], tensors, strict=True))
    torch.testing.assert_close(out, expected, atol=1e-6, rtol=0)


def test_dare_keeps_its_share_and_scales_it_up() -> None:
    base, vector = torch.zeros(10_000), torch.full((10_000,), 2.0)
    torch.manual_seed(0)
    out = torch.empty_like(base)
    dare_merge(base, [vector], [1.0], 0.25, out)
    assert sorted(set(out.tolist())) == [0.0, 8.0]
    # of 10,000 draws at 1/4 the standard error is 0.0043
    assert float((out > 0).float().mean()) == pytest.approx(0.25, abs=0.02)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_sums_run_in_float32_or_wider(dtype: torch.dtype) -> None:
    base = torch.full((40,), 1.0, dtype=dtype)
    tensors = [base + 2**-7, base + 2**-6]
    out = torch.empty(40, dtype=torch.float32 if dtype == torch.bfloat16 else dtype)
    for merge in (dare_merge, ties_merge):
        merge(base, tensors, [0.5, 0.5], 1.0, out)
        expected = 1 + (2**-8 + 2**-7) / (2 if merge is ties_merge else 1)
        assert set(out.tolist()) == {expected}
