from __future__ import annotations

import multiprocessing
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.models.tiny import tiny_tokenizer
from tests.rollouts.test_sampling import ids, model, prompts
from tpmm_pl.rollouts import sample_completions, sample_shared
from tpmm_pl.rollouts.sharing import dealt
from tpmm_pl.types import Completion

SETTINGS: dict[str, Any] = {"samples": 3, "max_new_tokens": 12, "key": "0/1/pairs", "batch_size": 7}


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 20), st.integers(1, 5), st.integers(1, 4), st.integers(1, 20))
def test_every_prompt_is_dealt_once_and_no_part_is_idle_that_need_not_be(
    count: int, parts: int, samples: int, batch_size: int
) -> None:
    shares = dealt(prompts(count), parts, samples=samples, batch_size=batch_size)
    assert sorted(chain.from_iterable(shares)) == list(range(count))
    assert len(shares) == parts
    sizes = [len(share) for share in shares]
    assert max(sizes) - min(sizes) <= max(1, batch_size // samples)


@pytest.mark.parametrize("parts", [2, 3])
def test_the_parts_are_the_whole_to_the_last_bit(parts: int) -> None:
    # batches of two prompts of one to five tokens: those of one length are padded with others
    asked, policy = prompts(11), model()
    whole = sample_completions(policy, tiny_tokenizer(), asked, **SETTINGS)
    made: dict[int, list[Completion]] = {}
    for share in dealt(asked, parts, samples=3, batch_size=7):
        part = [asked[place] for place in share]
        completions = sample_completions(policy, tiny_tokenizer(), part, **SETTINGS)
        made |= {p: completions[3 * n : 3 * n + 3] for n, p in enumerate(share)}
    assert list(chain.from_iterable(made[place] for place in range(11))) == whole


def test_one_process_samples_what_it_samples_alone() -> None:
    asked, policy = prompts(), model()
    alone = sample_completions(policy, tiny_tokenizer(), asked, **SETTINGS)
    assert sample_shared(policy, tiny_tokenizer(), asked, **SETTINGS) == alone
    assert sample_shared(policy, tiny_tokenizer(), [], **SETTINGS) == []


def _of_one_process(rank: int, store: str) -> Sequence[Sequence[Completion]]:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    made = [sample_shared(model(), tiny_tokenizer(), prompts(n), **SETTINGS) for n in (11, 1, 0)]
    dist.destroy_process_group()
    return made


@pytest.mark.slow
def test_two_processes_sample_what_one_does(tmp_path: Path) -> None:
    if not dist.is_available():
        pytest.skip("this torch has no torch.distributed")
    alone = [sample_shared(model(), tiny_tokenizer(), prompts(n), **SETTINGS) for n in (11, 1, 0)]
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        results = pool.starmap(_of_one_process, [(rank, f"{tmp_path}/store") for rank in range(2)])
    assert results == [alone, alone]
    assert len(ids(alone[0])) == 33
