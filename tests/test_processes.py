"""What crosses processes; with one, nothing does."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.distributed as dist

from tests.two_processes import together
from tpmm_pl import processes
from tpmm_pl.types import InputError, RunError


def test_one_process_holds_everything() -> None:
    assert (processes.count(), processes.rank(), processes.is_first()) == (1, 0, True)
    assert processes.share([3, 1, 2]) == [3, 1, 2]
    assert processes.gathered([3, 1, 2]) == [3, 1, 2]
    assert processes.from_each("a") == ["a"]
    assert processes.from_first(lambda: 5) == 5
    tensor = torch.tensor([1.0, 2.0])
    assert processes.mean(tensor) is tensor
    processes.wait()


def test_the_end_of_another_process_needs_another_process() -> None:
    assert not processes.is_loss(RuntimeError("Connection closed by peer"))


def _of_two() -> None:
    dist.init_process_group("gloo")
    rank = processes.rank()
    for count in range(5):
        items = list(range(count))
        assert processes.share(items) == items[rank::2]
        assert processes.gathered([10 * item for item in processes.share(items)]) == [
            10 * item for item in items
        ]
    assert processes.from_each(f"of {rank}") == ["of 0", "of 1"]
    assert processes.from_first(lambda: f"of {rank}") == "of 0"

    def fail(kind: type[Exception]) -> None:
        raise kind(f"in {rank}")

    with pytest.raises(InputError, match=r"^in 0"):
        processes.from_first(partial(fail, InputError))
    with pytest.raises(RunError, match="ValueError: in 0"):
        processes.from_first(partial(fail, ValueError))
    assert processes.largest(torch.tensor([float(rank), -rank])).tolist() == [1.0, 0.0]
    mine = torch.tensor([1.0, 2.0]) * (1 + 2 * rank)
    assert processes.mean(mine).tolist() == [2.0, 4.0]
    assert mine.tolist() == [1.0 + 2 * rank, 2.0 + 4 * rank], "what was given stays"
    assert processes.is_loss(RuntimeError("Connection reset by peer"))
    assert not processes.is_loss(RuntimeError("shapes do not fit"))


def test_two_processes_share_and_gather() -> None:
    together(_of_two)
