"""Which experts a token goes to, with what weight, and how evenly: gates, noise, balance.

Legend of shapes, beside that of ``types``: M tokens (N T of them), E experts, of which S are
shared (first) and R = E - S routed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tpmm_pl.types import InputError

SPREAD_FLOOR = 0.01
"""Least standard deviation of the router noise (Shazeer et al. 2017)."""
INITIAL_SPREAD = 0.02
"""Standard deviation of a fresh router's weights."""


@dataclass(frozen=True)
class MoESettings:
    """How a dense feed-forward layer becomes a mixture of experts.

    Raises:
        InputError: If the numbers contradict each other.
    """

    experts: int = 8
    """All of them, shared and routed."""
    active: int = 6
    """Experts that a token passes through, the shared ones included."""
    shared: int = 1
    """Experts that every token passes through."""
    normalise: bool = True
    """Whether a token's gates sum to 1, so that the fresh mixture computes what the dense did."""
    noise: bool = True
    """Whether the router is noisy in training."""
    reinitialise: float = 0.0
    """Share of every routed expert's units drawn afresh (Drop-Upcycling, Nakamura et al. 2025)."""

    def __post_init__(self) -> None:
        if self.shared < 1:
            raise InputError(f"shared is {self.shared}; at least 1 expert must be shared")
        if self.normal < 2:
            raise InputError(
                f"{self.experts} experts of which {self.shared} shared leave {self.normal} to "
                "route to; raise experts so that there are at least 2"
            )
        if not 1 <= self.top_k <= self.normal:
            raise InputError(
                f"active is {self.active}; with {self.shared} shared of {self.experts} experts it "
                f"must be in {self.shared + 1} .. {self.experts}"
            )
        if not 0 <= self.reinitialise <= 1:
            raise InputError(f"reinitialise is {self.reinitialise}; it is a share, in [0, 1]")

    @property
    def normal(self) -> int:
        """Return R, the number of routed experts."""
        return self.experts - self.shared

    @property
    def top_k(self) -> int:
        """Return how many routed experts a token passes through."""
        return self.active - self.shared


class Gates(NamedTuple):
    """What every token's experts are weighted with."""

    shared: Tensor
    """``(M,)`` float32: of each single shared expert."""
    routed: Tensor
    """``(M, top_k)`` float32: of the kept experts, largest first."""
    kept: Tensor
    """``(M, top_k)`` int64: their indices among the routed experts."""
    probabilities: Tensor
    """``(M, R)`` float32: the router's distribution; rows sum to 1."""


class Routing(NamedTuple):
    """How one layer spread the attended tokens of a forward pass over its experts."""

    importance: Tensor
    """``(R,)`` float32: sum of the kept gates, with gradient."""
    load: Tensor
    """``(R,)`` float32: expected tokens, with gradient, under noise; else the counts."""
    counts: Tensor
    """``(R,)`` int64: tokens that kept the expert."""
    gate_entropy: Tensor
    """Mean entropy of the router's distribution in nats, at most ``log R``."""
    weight: Tensor
    """``(E,)`` float32: mean gate of every expert, the shared ones first."""
    tokens: Tensor
    """Number of attended tokens, int64."""


def gate(logits: Tensor, top_k: int, *, shared: int = 1, normalise: bool = True) -> Gates:
    r"""Weight the shared and the ``top_k`` likeliest routed experts of every token.

    With :math:`p` the softmax of the logits, XFT's gate (Ding et al. 2024, arXiv 2404.15247) is
    :math:`1 - p_{\max}` for the shared experts together and
    :math:`p_{\max} \mathrm{softmax}(p_{kept})_j` for the routed: a token's gates sum to 1. Without
    normalisation the routed ones are :math:`p_j`.

    Args:
        logits: ``(M, R)``, any float dtype; the softmax is in float32.
        top_k: Routed experts to keep.
        shared: S, which split their weight evenly.
        normalise: Whether the gates sum to 1.
    """
    probabilities = logits.float().softmax(-1)
    values, kept = probabilities.topk(top_k, dim=-1)
    highest = values[:, :1]
    routed = highest * values.softmax(-1) if normalise else values
    return Gates((1 - highest[:, 0]) / shared, routed, kept, probabilities)


def expected_load(clean: Tensor, noisy: Tensor, spread: Tensor, kept: Tensor) -> Tensor:
    r"""Return the probability that each expert is kept when its noise alone is drawn again.

    :math:`\Phi\big((x W_g)_i - \text{kth\_excluding}(H(x), k, i)) / \text{spread}_i\big)`
    (Shazeer et al. 2017, eq. 9); 1 where all experts are kept.

    Args:
        clean: Logits without noise, ``(M, R)``.
        noisy: The logits that chose.
        spread: Standard deviations of the noise.
        kept: ``(M, top_k)`` indices of the largest noisy logits.

    Returns:
        ``(M, R)``, differentiable.
    """
    top_k = kept.shape[-1]
    if top_k == clean.shape[-1]:
        return torch.ones_like(clean)
    largest = noisy.topk(top_k + 1, dim=-1).values
    inside = torch.zeros_like(clean, dtype=torch.bool).scatter(-1, kept, True)
    # the k-th largest of the others: one further down for an expert that is among the k
    threshold = torch.where(inside, largest[:, top_k:], largest[:, top_k - 1 : top_k])
    probability: Tensor = torch.special.ndtr((clean - threshold) / spread)
    return probability


def squared_variation(amounts: Tensor) -> Tensor:
    """Return the squared coefficient of variation: 0 when equal, R - 1 when all on one of R."""
    return amounts.var(correction=0) / amounts.mean().square().clamp_min(1e-10)


def balance_loss(routing: Routing) -> Tensor:
    """Penalise uneven use of the experts (Shazeer et al. 2017, eq. 7 and 11); 0 when even."""
    return squared_variation(routing.importance) + squared_variation(routing.load)


class Router(nn.Module):
    """Chooses and weights experts; kept and computed in float32 whatever the model's dtype.

    Args:
        width: H.
        settings: Numbers of experts, the form of the gate, and whether training is noisy.
        generator: Draws the weights; the noise's own start at 0.
        device: Where they go.
    """

    def __init__(
        self,
        width: int,
        settings: MoESettings,
        *,
        generator: torch.Generator,
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        shape = settings.normal, width
        # float32 also where a trainer has set another default dtype
        drawn = torch.randn(
            shape, generator=generator, device=generator.device, dtype=torch.float32
        )
        self.settings = settings
        self.weight = nn.Parameter((INITIAL_SPREAD * drawn).to(device))
        self.noise_weight: nn.Parameter | None = None
        if settings.noise:
            zeros = torch.zeros(shape, device=device, dtype=torch.float32)
            self.noise_weight = nn.Parameter(zeros)
        self.recording: _Recording | None = None

    def forward(self, x: Tensor) -> Gates:
        """Return the gates of the tokens of ``x``, ``(.., H)``; M is their number."""
        rows = x.reshape(-1, x.shape[-1]).float()
        noisy, spread = None, None
        with torch.autocast(x.device.type, enabled=False):
            clean = F.linear(rows, self.weight)
            if self.noise_weight is not None and self.training:
                spread = F.softplus(F.linear(rows, self.noise_weight)) + SPREAD_FLOOR
                noisy = clean + self._noise(clean) * spread
        s = self.settings
        gates = gate(
            clean if noisy is None else noisy, s.top_k, shared=s.shared, normalise=s.normalise
        )
        if self.recording is not None:
            load = None
            if noisy is not None and spread is not None:
                load = expected_load(clean, noisy, spread, gates.kept)
            self.recording.note(x, gates, load, s)
        return gates

    def _noise(self, like: Tensor) -> Tensor:
        seed = None if self.recording is None else self.recording.seed
        if seed is None:
            return torch.randn_like(like)
        # seeded anew each time: a checkpointed block that computes again inside the context
        # must route its tokens as it did before
        generator = torch.Generator(like.device).manual_seed(seed)
        return torch.randn(like.shape, generator=generator, device=like.device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Router:
        # rounded to bfloat16, logits tie; so a cast of the model leaves these weights alone
        def moved(tensor: Tensor) -> Tensor:
            cast = fn(tensor)
            return cast if cast.dtype == tensor.dtype else tensor.to(cast.device)

        super()._apply(moved, recurse)  # type: ignore[no-untyped-call]
        return self


@dataclass
class _Recording:
    """Where a router notes its statistics, and what its noise is drawn with."""

    layer: str
    routings: dict[str, Routing]
    attention_mask: Tensor | None
    seed: int | None

    def note(self, x: Tensor, gates: Gates, load: Tensor | None, settings: MoESettings) -> None:
        seen = torch.ones(x.shape[:-1], dtype=torch.long, device=x.device)
        if self.attention_mask is not None:
            if self.attention_mask.shape != seen.shape:
                raise ValueError(
                    f"layer {self.layer} saw tokens {tuple(seen.shape)}, but the attention "
                    f"mask is {tuple(self.attention_mask.shape)}"
                )
            seen = self.attention_mask.to(x.device)
        self.routings[self.layer] = summarise(gates, load, seen.flatten(), settings)


def summarise(gates: Gates, load: Tensor | None, seen: Tensor, settings: MoESettings) -> Routing:
    """Sum the gates of tokens over the rows that they are part of.

    Args:
        gates: Of all M tokens.
        load: Probabilities that experts are kept, ``(M, R)``; ``None``: whether they are.
        seen: In how many rows each token stands, ``(M,)`` int64; 0 for padding.
        settings: Numbers of experts.
    """
    tokens = seen.sum()
    # a product, not a selection by a mask, whose size the device would have to tell first
    mask = seen.float()[:, None]
    zeros = torch.zeros_like(gates.probabilities)
    importance = (zeros.scatter(-1, gates.kept, gates.routed) * mask).sum(0)
    counts = (zeros.scatter(-1, gates.kept, 1.0).long() * seen[:, None]).sum(0)
    entropy = torch.special.entr(gates.probabilities).sum(-1)
    shared = (gates.shared * mask[:, 0]).sum()
    whole = torch.cat([shared.expand(settings.shared), importance])
    return Routing(
        importance=importance,
        load=counts.float() if load is None else (load * mask).sum(0),
        counts=counts,
        gate_entropy=(entropy * mask[:, 0]).sum() / tokens.clamp_min(1),
        weight=whole / tokens.clamp_min(1),
        tokens=tokens,
    )


def joined(parts: Sequence[Routing]) -> Routing:
    """Return what a router did with the tokens of several batches together.

    Args:
        parts: Of one router, at least one.
    """
    tokens = torch.stack([part.tokens for part in parts])
    shares = tokens.float() / tokens.sum().clamp_min(1)
    sums, means = ("importance", "load", "counts"), ("gate_entropy", "weight")
    columns = {name: torch.stack([getattr(p, name) for p in parts]) for name in (*sums, *means)}
    return Routing(
        **{name: columns[name].sum(0) for name in sums},
        **{name: torch.tensordot(shares, columns[name], 1) for name in means},
        tokens=tokens.sum(),
    )


@contextmanager
def recorded_routing(
    model: nn.Module,
    attention_mask: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Iterator[dict[str, Routing]]:
    """Record how the mixture layers of a model route inside the block.

    Args:
        model: Holds the layers; without any the block records nothing.
        attention_mask: ``(N, T)`` as the forward passes see tokens: how often each counts in the
            statistics, padding never; no matter to the output. ``None``: every token once.
        generator: Seeds the router noise of each layer once; ``None``: the global generator
            draws it. Every pass through a layer inside the block then draws the same noise, so
            with gradient checkpointing the backward pass belongs inside the block too.

    Yields:
        Layer name -> :class:`Routing`, filled by forward passes; the last one wins.
    """
    routings: dict[str, Routing] = {}
    routers = {name: m for name, m in model.named_modules() if isinstance(m, Router)}
    for name, router in routers.items():
        seed = None
        if generator is not None:
            device = generator.device
            seed = int(torch.randint(1 << 62, (), generator=generator, device=device))
        layer = name.rpartition(".")[0]
        router.recording = _Recording(layer, routings, attention_mask, seed)
    try:
        yield routings
    finally:
        for router in routers.values():
            router.recording = None
