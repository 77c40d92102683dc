"""Adapters side by side in one model: merged as products, cut to a rank.

The factors of K adapters are stacked into one adapter of K times the rank, whose product is the
weighted sum of theirs. Averaging A and B apart would be another function.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from copy import deepcopy
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from tpmm_pl.types import InputError, StateDict

TRAINED, MERGED, CUT = "default", "merge", "cut"
"""Names of the adapter that trains, of a stacked merge, and of a merge cut to a rank."""

_MAGNITUDE = "lora_magnitude_vector"


def adapter_parameters(policy: nn.Module, adapter: str) -> dict[str, nn.Parameter]:
    """Return what one adapter holds: its factors, magnitudes, and modules that train whole."""
    return {
        name: parameter
        for name, parameter in policy.named_parameters()
        if ("lora_" in name or "modules_to_save." in name)
        and (f".{adapter}." in name or name.endswith(f".{adapter}"))
    }


def file_name(name: str, adapter: str) -> str:
    """Return how ``peft`` calls a parameter of an adapter in a file."""
    name = name.replace(f"modules_to_save.{adapter}.", "")
    if f"{_MAGNITUDE}.{adapter}" in name:
        return name.removesuffix(f".{adapter}.weight")
    return name.replace(f".{adapter}.", ".").removesuffix(f".{adapter}")


def is_mergeable(policy: nn.Module) -> bool:
    """Say whether a merge of several of the policy's snapshots is a policy of its kind."""
    if not isinstance(policy, PeftModel):
        return True
    return not getattr(policy.peft_config[TRAINED], "use_dora", False)


def check_mergeable(policy: nn.Module) -> None:
    """Refuse to merge several snapshots of a policy whose merges are none of its kind.

    Raises:
        InputError: If its adapters scale the rows of full weights (DoRA).
    """
    if not is_mergeable(policy):
        raise InputError(
            "a merge of several adapters with use_dora is no adapter; set lora.use_dora false, or"
            " reference.strategy last or initial with next_policy last and ship merge"
        )


def stack_adapters(
    policy: PeftModel, sources: list[StateDict]
) -> tuple[dict[str, nn.Parameter], list[StateDict]]:
    """Make and activate an adapter of the stacked rank for a merge of snapshots.

    Args:
        policy: Gets the adapter :data:`MERGED`, which takes the place of an older one.
        sources: K snapshots of its adapter.

    Returns:
        The parameters of the new adapter, and K sources of the same names: their weighted sum is
        the adapter whose product is the weighted sum of products.
    """
    check_mergeable(policy)
    unstack(policy)
    _add(policy, MERGED, _stacked_config(policy.peft_config[TRAINED], len(sources)))
    parameters = adapter_parameters(policy, MERGED)
    names = {name: file_name(name, MERGED) for name in parameters}
    return parameters, [_StackedSource(names, sources, k) for k in range(len(sources))]


def unstack(policy: PeftModel) -> None:
    """Activate the adapter that trains and delete the others."""
    policy.set_adapter(TRAINED)
    for adapter in (MERGED, CUT):
        if adapter in policy.peft_config:
            policy.delete_adapter(adapter)


@torch.no_grad()
def cut_active(policy: PeftModel, rank: int | None) -> float:
    """Put the best approximation of the active adapter by one of a lower rank in its place.

    Args:
        policy: Gets the adapter :data:`CUT`; :func:`unstack` deletes it.
        rank: Of all adapted layers; ``None``: as the adapter that trains has it.

    Returns:
        The relative error, see :func:`write_product`.
    """
    active = str(policy.active_adapter)
    if active == TRAINED and rank is None:
        return 0.0
    _add(policy, CUT, _cut_config(policy.peft_config[TRAINED], rank))
    for name, parameter in adapter_parameters(policy, CUT).items():
        if "lora_" in name:
            # a rank above the product's leaves rows that must not be the random ones of a start
            parameter.zero_()
    return write_product(policy, active, CUT)


@torch.no_grad()
def write_product(policy: PeftModel, source: str, target: str) -> float:
    """Write one adapter into another of lower rank: the best approximation of the product.

    By the truncated singular value decomposition (Eckart and Young 1936).

    Returns:
        The relative error of the weights' change in the Frobenius norm, 0 where exact.
    """
    theirs, ours = adapter_parameters(policy, source), adapter_parameters(policy, target)
    lost = total = 0.0
    for name, parameter in ours.items():
        if "lora_" not in name:
            parameter.copy_(theirs[_of(name, target, source)])
        if _factor(name) != "A":
            continue
        other = _other_factor(name)
        b, a = (theirs[_of(one, target, source)].double() for one in (other, name))
        left, singular, right = _svd_of_product(b, a)
        layer: Any = policy.get_submodule(name.partition(".lora_")[0])
        singular = singular * layer.scaling[source]
        rank = parameter.shape[0]
        lost += float(singular[rank:].square().sum())
        total += float(singular.square().sum())
        _write_factors(ours[other], parameter, left, singular / layer.scaling[target], right)
    return (lost / total) ** 0.5 if total else 0.0


def _add(policy: PeftModel, adapter: str, config: Any) -> None:
    policy.add_adapter(adapter, config)
    policy.set_adapter(adapter)
    device = next(policy.parameters()).device
    for parameter in adapter_parameters(policy, adapter).values():
        parameter.data = parameter.data.to(device)


def _svd_of_product(b: Tensor, a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    # the SVD of B A from the small matrix between two orthogonal bases, never of (out, in) size
    basis_b, upper_b = torch.linalg.qr(b)
    basis_a, upper_a = torch.linalg.qr(a.T)
    left, singular, right = torch.linalg.svd(upper_b @ upper_a.T, full_matrices=False)
    return basis_b @ left, singular, right @ basis_a.T


def _write_factors(b: Tensor, a: Tensor, left: Tensor, singular: Tensor, right: Tensor) -> None:
    kept = min(len(a), len(singular))
    root = singular[:kept].sqrt()
    # a direction of no weight keeps a row of A: with both factors 0 it would never train
    scale = torch.where(root > 1e-6 * root[0], root, 1.0)
    b.zero_()
    b[:, :kept] = left[:, :kept] * (singular[:kept] / scale)
    a[:kept] = scale[:, None] * right[:kept]


def _factor(name: str) -> str:
    # lora_A.default.weight, lora_embedding_A.default
    what = name.partition(".lora_")[2].removeprefix("embedding_")
    return what[:1] if what[1:2] == "." else ""


def _other_factor(name: str) -> str:
    return name.replace("lora_A", "lora_B").replace("lora_embedding_A", "lora_embedding_B")


def _of(name: str, adapter: str, other: str) -> str:
    if name.endswith(f".{adapter}"):
        return f"{name.removesuffix(adapter)}{other}"
    return name.replace(f".{adapter}.", f".{other}.")


class _StackedSource(Mapping[str, Tensor]):
    """Source k of a stacked adapter: its own rows of A, all columns of B.

    The weighted sum over k then is the adapter whose product is the weighted sum of products.
    Modules that train whole are their own.
    """

    def __init__(self, names: Mapping[str, str], sources: list[StateDict], k: int) -> None:
        self._names, self._sources, self._k = names, sources, k

    def __getitem__(self, name: str) -> Tensor:
        parts = [source[self._names[name]] for source in self._sources]
        factor = _factor(name)
        if factor == "B":
            return torch.cat(parts, dim=1)
        if factor != "A":
            return parts[self._k]
        blank = [part if k == self._k else torch.zeros_like(part) for k, part in enumerate(parts)]
        return torch.cat(blank)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _stacked_config(trained: Any, count: int) -> Any:
    config = _plain_config(trained)
    # the scale stays what it is: alpha / r, or alpha / sqrt(r) with use_rslora
    growth = count**0.5 if config.use_rslora else count
    config.r *= count
    config.lora_alpha *= growth
    config.rank_pattern = {name: rank * count for name, rank in config.rank_pattern.items()}
    config.alpha_pattern = {name: a * growth for name, a in config.alpha_pattern.items()}
    return config


def _cut_config(trained: Any, rank: int | None) -> Any:
    config = _plain_config(trained)
    if rank is not None:
        # of the scale 1, whatever the layers' own are
        config.r = config.lora_alpha = rank
        config.rank_pattern, config.alpha_pattern, config.use_rslora = {}, {}, False
    return config


def _plain_config(trained: Any) -> Any:
    config = deepcopy(trained)
    # all factors are overwritten, and other ways to begin (PiSSA) change the model itself
    config.init_lora_weights = True
    config.lora_dropout = 0.0
    return config
