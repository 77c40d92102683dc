"""What crosses processes, over the process group that is up; one process needs none.

The group is that of the Trainer, of Fabric or of ``torchrun``, whichever has made it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch.distributed as dist
from torch import Tensor

from tpmm_pl.types import InputError, RunError

T = TypeVar("T")


def count() -> int:
    """Return how many processes work together."""
    return dist.get_world_size() if _together() else 1


def rank() -> int:
    """Return the number of this process, from 0."""
    return dist.get_rank() if _together() else 0


def is_first() -> bool:
    """Tell whether this process is the one that writes files and prints."""
    return rank() == 0


def wait() -> None:
    """Wait until every process has come here."""
    if _together():
        dist.barrier()


def share(items: Sequence[T]) -> Sequence[T]:
    """Return this process's share of items that all processes hold: every N-th one."""
    return items[rank() :: count()]


def gathered(mine: Sequence[T]) -> list[T]:
    """Return the results of all shares in the order of the items, on every process.

    Args:
        mine: One result for each item of this process's :func:`share`.
    """
    shares: list[Sequence[T]] = from_each(mine)
    total = sum(map(len, shares))
    return [shares[index % len(shares)][index // len(shares)] for index in range(total)]


def from_each(mine: T) -> list[T]:
    """Return what each process holds, by their numbers, on every process."""
    if not _together():
        return [mine]
    results: list[Any] = [None] * count()
    dist.all_gather_object(results, mine)
    return results


def from_first(make: Callable[[], T]) -> T:
    """Have the first process make something; return it on every process.

    Raises:
        InputError: What ``make`` raises there, on every process.
        RunError: The same, or another exception's account where there are several processes.
    """
    if not _together():
        return make()
    result: list[Any] = [None, None]
    if is_first():
        try:
            result[0] = make()
        except Exception as error:
            # an exception of another library may not bear the way
            ours = isinstance(error, InputError | RunError)
            result[1] = error if ours else RunError(f"{type(error).__name__}: {error}")
    dist.broadcast_object_list(result, src=0)
    if result[1] is not None:
        raise result[1]
    made: T = result[0]
    return made


def mean(tensor: Tensor) -> Tensor:
    """Return the mean of all processes' tensors of one shape, on the device of the one given."""
    return _reduced(tensor, dist.ReduceOp.SUM) / count() if _together() else tensor


def largest(tensor: Tensor) -> Tensor:
    """Return the elementwise maximum of all processes' tensors of one shape."""
    return _reduced(tensor, dist.ReduceOp.MAX)


def is_loss(error: BaseException) -> bool:
    """Tell whether an error is that another process has ended."""
    ended = ("closed by peer", "reset by peer", "Broken pipe", "remote process exited")
    told = isinstance(error, RuntimeError) and any(words in str(error) for words in ended)
    return told and _together()


def _together() -> bool:
    return dist.is_available() and dist.is_initialized()


def _reduced(tensor: Tensor, operation: Any) -> Tensor:
    if not _together():
        return tensor
    # NCCL reduces nothing that is not on a GPU
    total = tensor.cuda() if "nccl" in dist.get_backend() else tensor.clone()
    dist.all_reduce(total, operation)
    return total.to(tensor.device)
