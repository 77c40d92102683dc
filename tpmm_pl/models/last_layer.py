"""A decoder's last feed-forward layer, run only where its output is read."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from tpmm_pl.modes import evaluating


def last_feed_forward(decoder: nn.Module) -> nn.Module | None:
    """Find the largest part of the last block that treats every token by itself.

    What it is called does not matter: candidates are tried on random states.

    Args:
        decoder: Its blocks are the members of its first module list.

    Returns:
        The module; ``None`` where no part is found.
    """
    blocks = next((m for m in decoder.modules() if isinstance(m, nn.ModuleList)), None)
    width = getattr(getattr(decoder, "config", None), "hidden_size", None)
    if not blocks or not isinstance(width, int):
        return None
    parts = sorted(blocks[-1].children(), key=_size, reverse=True)
    return next((part for part in parts if _is_token_wise(part, width)), None)


@contextmanager
def only_at(module: nn.Module, tokens: Tensor) -> Iterator[None]:
    """Run a token-wise module at some tokens of one row; other tokens get the output of any.

    Right where nothing later reads the others, as behind the last attention layer.

    Args:
        module: From ``(1, T, H)`` to ``(1, T, H)``.
        tokens: ``(M,)`` indices.
    """
    count = 0

    def narrow(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        nonlocal count
        count = inputs[0].shape[1]
        return inputs[0].index_select(1, tokens), *inputs[1:]

    def widen(_: nn.Module, __: tuple[Tensor, ...], output: Tensor) -> Tensor:
        place = torch.zeros(count, dtype=torch.long, device=tokens.device)
        place[tokens] = torch.arange(len(tokens), device=tokens.device)
        return output.index_select(1, place)

    hooks = module.register_forward_pre_hook(narrow), module.register_forward_hook(widen)
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _is_token_wise(module: nn.Module, width: int) -> bool:
    matrices = [p for p in module.parameters() if p.ndim == 2]
    if len(matrices) < 2:  # a norm, or half of a layer
        return False
    some, parameter = [0, 3], matrices[0]
    dtype = parameter.dtype if parameter.is_floating_point() else torch.get_default_dtype()
    states = torch.linspace(-1, 1, 6 * width, dtype=dtype, device=parameter.device)
    states = states.reshape(1, 6, width)
    try:
        with torch.no_grad(), evaluating(module):
            whole, part = module(states), module(states[:, some])
    except Exception:  # called otherwise than with states alone, as attention is
        return False
    same = isinstance(whole, Tensor) and whole.shape == states.shape
    return same and torch.allclose(whole[:, some], part, rtol=1e-3, atol=1e-4)
