"""A head whose weights are spread over processes."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode

from tests.test_head_logps import (
    GRADIENT,
    STATE_OF,
    TARGETS,
    Inputs,
    assert_near,
    budget,
    gradients,
    inputs,
)
from tpmm_pl.logps import head_logps


@pytest.fixture
def _group() -> Iterator[None]:
    if not dist.is_available():
        pytest.skip("this torch has no torch.distributed")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
    yield
    dist.destroy_process_group()


def sharded(given: Inputs, processes: int) -> Inputs:
    mesh = init_device_mesh("cpu", (processes,))
    hidden, weight, bias = given
    assert bias is not None
    head = [distribute_tensor(one.detach(), mesh, [Shard(0)]) for one in (weight, bias)]
    return hidden, head[0].requires_grad_(), head[1].requires_grad_()


@pytest.mark.usefixtures("_group")
@pytest.mark.parametrize("rows", [3, 1000])
def test_a_sharded_head_gives_the_same(rows: int) -> None:
    given = inputs()
    expected = head_logps(*given, STATE_OF, TARGETS, budget=budget(rows))
    shards = sharded(given, 1)
    values = head_logps(*shards, STATE_OF, TARGETS, budget=budget(rows))
    assert type(values) is Tensor
    assert torch.equal(values, expected)
    for ours, theirs in zip(gradients(values, shards), gradients(expected, given), strict=True):
        whole = ours.full_tensor() if isinstance(ours, DTensor) else ours
        assert torch.equal(whole, theirs)


def _of_one_process(rank: int, store: str) -> tuple[list[Any], list[Any], dict[str, int]]:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    given = sharded(inputs(), 2)
    with CommDebugMode() as communication:
        values = head_logps(*given, STATE_OF, TARGETS, budget=budget(3))
    counts = {str(name): count for name, count in communication.get_comm_counts().items()}
    # every process has a batch of its own
    (values * (1 + rank)).backward(GRADIENT)
    grads = [one.grad.full_tensor().tolist() for one in given[1:]]  # type: ignore[union-attr]
    dist.destroy_process_group()
    return values.tolist(), grads, counts


@pytest.mark.slow
def test_processes_that_share_a_head_average_its_gradient(tmp_path: Path) -> None:
    if not dist.is_available():
        pytest.skip("this torch has no torch.distributed")
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        results = pool.starmap(_of_one_process, [(rank, f"{tmp_path}/store") for rank in range(2)])
    given = inputs()
    expected = head_logps(*given, STATE_OF, TARGETS)
    (_, *of_head) = gradients(1.5 * expected, given)
    for values, grads, counts in results:
        torch.testing.assert_close(torch.tensor(values), expected, atol=1e-6, rtol=0)
        for ours, theirs in zip(grads, of_head, strict=True):
            assert_near(torch.tensor(ours), theirs, 1e-6)
        assert sum(counts.values()) == 2, "weight and bias are gathered once, not once a chunk"
