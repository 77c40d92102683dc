"""Linear merges of weights, with coefficients shared by groups of parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from math import acos, sin

import torch
from torch import Tensor

from tpmm_pl.registry import lookup
from tpmm_pl.types import StateDict

CHUNK = 1 << 18
"""Elements summed at a time: the running sum stays in the processor's cache."""


PARALLEL = 0.9995
"""Cosine from which on the arc between two tensors is a straight line."""


def weighted_sum(
    tensors: Sequence[Tensor], weights: Sequence[float], out: Tensor, *, divisor: float = 1.0
) -> Tensor:
    r"""Write :math:`\sum_k w_k x_k / d` into ``out``, summed in float32 or wider and cast once.

    Terms of weight 0 are not read, and a weight of 1 multiplies exactly, so one-hot weights
    copy a source bit for bit.

    Args:
        tensors: K tensors of the shape of ``out``, any float dtype, any device.
        weights: K numbers, used as given.
        out: Receives the sum in its own dtype; contiguous.
        divisor: :math:`d`, of the whole sum.

    Returns:
        ``out``.
    """
    used = [(t.detach().reshape(-1), w) for t, w in zip(tensors, weights, strict=True) if w]
    flat = out.detach().view(-1)
    wide = torch.promote_types(out.dtype, torch.float32)
    for start in range(0, flat.numel(), CHUNK):
        piece = flat[start : start + CHUNK]
        # from -0.0, the neutral element of addition: 0.0 would turn a source's -0.0 into 0.0
        total = torch.full_like(piece, -0.0, dtype=wide)
        for tensor, weight in used:
            source = tensor[start : start + CHUNK].to(piece.device, wide)
            total.add_(source, alpha=weight)
        if divisor != 1.0:
            total.div_(divisor)
        piece.copy_(total)
    return out


def slerp_coefficients(first: Tensor, second: Tensor, t: float) -> tuple[float, float]:
    r"""Return the weights of two tensors at ``t`` of the arc between their directions.

    .. math:: \frac{\sin((1 - t)\Omega)}{\sin\Omega}, \frac{\sin(t\Omega)}{\sin\Omega}

    (Shoemake 1985); :math:`\Omega` is the angle between the tensors as vectors. Where they are
    nearly parallel or opposite, or one is zero, ``1 - t`` and ``t``.

    Args:
        first: Of any shape and float dtype.
        second: Of the same shape.
        t: 0 is the first, 1 the second.
    """
    a, b = first.detach().reshape(-1), second.detach().reshape(-1)
    dot = square_a = square_b = 0.0
    for start in range(0, a.numel(), CHUNK):
        x, y = (tensor[start : start + CHUNK].double() for tensor in (a, b))
        dot += float(x @ y)
        square_a += float(x @ x)
        square_b += float(y @ y)
    lengths = (square_a * square_b) ** 0.5
    if not lengths or abs(dot) > PARALLEL * lengths:
        return 1 - t, t
    angle = acos(dot / lengths)
    return sin((1 - t) * angle) / sin(angle), sin(t * angle) / sin(angle)


def linear_merge(states: Sequence[StateDict], weights: Tensor) -> dict[str, Tensor]:
    r"""Return :math:`\sum_k w_k \theta_k` for every floating-point tensor.

    Integer and boolean entries (position ids, counters) are taken from the last state.

    Args:
        states: ``K`` state dicts with the same keys and shapes, oldest first.
        weights: ``(K,)``; used as given, so pass a distribution for an average.

    Returns:
        The merged state, in the dtype of ``states[-1]``; the sum runs in float32 or wider.

    Raises:
        ValueError: If ``states`` is empty, disagrees in keys or shapes, or ``weights`` is not
            ``(K,)``.

    Examples:
        >>> a, b = {"w": torch.zeros(2)}, {"w": torch.ones(2)}
        >>> linear_merge([a, b], torch.tensor([0.25, 0.75]))["w"]
        tensor([0.7500, 0.7500])
    """
    if weights.shape != (len(states),) or not states:
        raise ValueError(f"{len(states)} states but weights of shape {tuple(weights.shape)}")
    return grouped_merge(states, weights[None], dict.fromkeys(states[-1], 0))


def grouped_merge(
    states: Sequence[StateDict], coefficients: Tensor, group_of: Mapping[str, int]
) -> dict[str, Tensor]:
    r"""Return :math:`\sum_k c_{g k} \theta_k` with one row of coefficients a group.

    Args:
        states: K state dicts with the same keys and shapes, oldest first.
        coefficients: ``(G, K)``.
        group_of: The row of every key.

    Returns:
        The merged state in the dtype of the last; entries that are no floats are its own.

    Raises:
        ValueError: If the states disagree in keys or shapes.
    """
    last = states[-1]
    for number, state in enumerate(states):
        check_fits(state, last, f"state {number}")
    merged = {}
    for name, tensor in last.items():
        if not tensor.is_floating_point():
            merged[name] = tensor.clone()
            continue
        sources = [state[name] for state in states]
        row = coefficients[group_of[name]].tolist()
        merged[name] = weighted_sum(sources, row, torch.empty_like(tensor).contiguous())
    return merged


def check_fits(state: StateDict, model: StateDict, what: str) -> None:
    """Refuse a state whose keys or shapes are not the model's.

    Raises:
        ValueError: Naming ``what``, the first key and both shapes.
    """
    odd = sorted(set(state) ^ set(model))
    if odd:
        side = "lacks" if odd[0] in model else "has an extra"
        raise ValueError(f"{what} {side} tensor {odd[0]} ({len(odd)} names differ)")
    for name, tensor in model.items():
        if state[name].shape != tensor.shape:
            shapes = f"{tuple(state[name].shape)}, not {tuple(tensor.shape)}"
            raise ValueError(f"{what}: tensor {name} has shape {shapes}")


def assign_groups(names: Iterable[str], grouping: str) -> tuple[tuple[str, ...], dict[str, int]]:
    """Put every parameter into the group whose coefficients it uses.

    A block is recognised by the number in its parameters' names (``model.layers.3.mlp...``);
    what stands before the first block is ``embeddings``, what stands after is ``head``.

    Args:
        names: Names of parameters in the model's order.
        grouping: ``model`` (one group), ``layer`` (embeddings, each block, final norm and head),
            ``block`` (attention and MLP of each layer apart) or ``tensor`` (each its own).

    Returns:
        The groups' names in the order of first use, and the group index of each name.

    Raises:
        InputError: If ``grouping`` is unknown.
    """
    label = lookup("group", grouping, _GROUPINGS)
    labels: dict[str, str] = {}
    seen_block = False
    for name in names:
        seen_block = seen_block or _block_number(name) is not None
        labels[name] = label(name, seen_block)
    groups = tuple(dict.fromkeys(labels.values()))
    index = {group: number for number, group in enumerate(groups)}
    return groups, {name: index[group] for name, group in labels.items()}


def _block_number(name: str) -> str | None:
    return next((part for part in name.split(".") if part.isdigit()), None)


def _layer_label(name: str, seen_block: bool) -> str:
    number = _block_number(name)
    if number is None:
        return "head" if seen_block else "embeddings"
    return f"layer_{int(number):02d}"


def _block_label(name: str, seen_block: bool) -> str:
    number = _block_number(name)
    layer = _layer_label(name, seen_block)
    if number is None:
        return layer
    within = name.split(".")[name.split(".").index(number) + 1 :]
    # the norm in front of attention goes with it; every other part of the block with the MLP
    attention = {"self_attn", "attn", "attention", "self_attention", "input_layernorm", "ln_1"}
    return f"{layer}_{'attention' if attention & set(within) else 'mlp'}"


_GROUPINGS: dict[str, Callable[[str, bool], str]] = {
    "model": lambda name, seen_block: "model",
    "layer": _layer_label,
    "block": _block_label,
    "tensor": lambda name, seen_block: name,
}


def check_grouping(grouping: str) -> None:
    """Refuse an unknown grouping before any work is done.

    Raises:
        InputError: Naming the nearest ones.
    """
    lookup("group", grouping, _GROUPINGS)
