"""Completions of a causal language model, token by token; copies of a prompt share its prefill."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from inspect import signature
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from tpmm_pl.models.draws import draw_tokens
from tpmm_pl.models.roomy_cache import roomy_cache, rows_can_be_chosen

Tokens = tuple[int, ...]


@dataclass(frozen=True)
class Decoding:
    """How completions are sampled."""

    max_new_tokens: int
    """Budget of a completion, end token included."""
    end_ids: Tokens
    """Tokens that end a completion."""
    pad_id: int
    """Fills rows."""
    temperature: float = 1.0
    """0 takes the most likely token."""


class Decoded(NamedTuple):
    """One completion."""

    ids: Tokens
    """The end token included where it was sampled."""
    logps: tuple[float, ...]
    """Of each token, in nats, at temperature 1."""


def shares_prefill(model: nn.Module) -> bool:
    """Tell whether rows of the model's cache can be copied and dropped, as :func:`decode` does.

    Rows of keys and values can; recurrent states and those of encoders are kept in other ways.
    """
    inner = _inner(model)
    if inner.config.is_encoder_decoder or "past_key_values" not in _inputs(inner):
        return False
    return rows_can_be_chosen(roomy_cache(inner.config))


@torch.no_grad()
def decode(
    model: nn.Module, prompts: Sequence[Tokens], keys: Tensor, settings: Decoding
) -> list[Decoded]:
    """Sample a completion a prompt; equal prompts are prefilled once, ended rows are dropped.

    Args:
        model: A causal language model that :func:`shares_prefill`.
        prompts: Token ids, N.
        keys: Of each row's noise, ``(N,)`` int64, on the model's device.
        settings: Of all rows.

    Returns:
        The completions, in order.
    """
    forward = _CachedForward(model)
    distinct = list(dict.fromkeys(prompts))
    ids, mask = left_padded(distinct, settings.pad_id, keys.device)
    scores = forward(ids, mask)
    number = {prompt: index for index, prompt in enumerate(distinct)}
    copies = torch.tensor([number[prompt] for prompt in prompts], device=keys.device)
    forward.keep(copies)
    scores, mask = scores[copies], mask[copies]
    ends = torch.tensor(settings.end_ids, dtype=torch.long, device=keys.device)
    rows = torch.arange(len(prompts), device=keys.device)
    made = ids.new_zeros(len(prompts), settings.max_new_tokens)
    logps = torch.zeros_like(made, dtype=torch.float32)
    for position in range(settings.max_new_tokens):
        drawn = draw_tokens(scores, keys, position, settings.temperature)
        made[rows, position], logps[rows, position] = drawn
        going = torch.isin(drawn.tokens, ends, invert=True).nonzero().squeeze(1)
        if position + 1 == settings.max_new_tokens or not len(going):
            break
        if len(going) < len(rows):
            forward.keep(going)
            rows, keys, mask = rows[going], keys[going], mask[going]
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
        scores = forward(drawn.tokens[going, None], mask)
    return _cut(made, logps, settings)


@torch.no_grad()
def decode_with_generate(
    model: nn.Module, prompts: Sequence[Tokens], keys: Tensor, settings: Decoding
) -> list[Decoded]:
    """Sample what :func:`decode` samples by the model's own ``generate``, each row for itself."""
    ids, mask = left_padded(prompts, settings.pad_id, keys.device)
    draws = _KeyedDraws(keys, settings.temperature)
    with _plain_generation(model):
        generated = model.generate(  # type: ignore[operator]
            input_ids=ids,
            attention_mask=mask,
            logits_processor=LogitsProcessorList([draws]),
            generation_config=GenerationConfig(
                do_sample=False,
                max_new_tokens=settings.max_new_tokens,
                eos_token_id=list(settings.end_ids),
                pad_token_id=settings.pad_id,
            ),
        )
    return _cut(generated[:, -len(draws.logps) :], torch.stack(draws.logps, 1), settings)


def left_padded(
    prompts: Sequence[Tokens], pad_id: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return ids and attention mask, each ``(N, T)`` int64, prompts at the right."""
    width = max(map(len, prompts))
    ids = [[pad_id] * (width - len(prompt)) + list(prompt) for prompt in prompts]
    mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


class _CachedForward:
    """The model's forward pass over what is new, in the arguments that the model knows."""

    def __init__(self, model: nn.Module) -> None:
        inner = _inner(model)
        self._model = model
        self._known = _inputs(inner)
        self._cache = roomy_cache(inner.config)
        self._padded: bool | None = None

    def __call__(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Return the logits behind the last token, ``(N, V)``.

        Args:
            ids: Tokens after those in the cache, ``(N, T)``.
            mask: Of all tokens so far, 0 on padding.
        """
        positions = mask.cumsum(1).sub_(1).clamp_(min=0)[:, -ids.shape[1] :]
        if self._padded is None:
            self._padded = not bool(mask.all())
        # a router's balance loss would take the mask for one of the new tokens
        inputs = {"position_ids": positions, "logits_to_keep": 1, "output_router_logits": False}
        output = self._model(
            input_ids=ids,
            attention_mask=mask if self._padded else None,  # attention is faster without
            past_key_values=self._cache,
            use_cache=True,
            **{name: value for name, value in inputs.items() if name in self._known},
        )
        logits: Tensor = output.logits[:, -1]
        return logits

    def keep(self, rows: Tensor) -> None:
        """Copy or drop rows of the cache."""
        self._cache.batch_select_indices(rows)


class _KeyedDraws(LogitsProcessor):
    """Leaves ``generate`` nothing but the token drawn; keeps its log-probability."""

    def __init__(self, keys: Tensor, temperature: float) -> None:
        self._keys = keys
        self._temperature = temperature
        self.logps: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        drawn = draw_tokens(scores, self._keys, len(self.logps), self._temperature)
        self.logps.append(drawn.logps)
        return torch.full_like(scores, -torch.inf).scatter_(1, drawn.tokens[:, None], 0.0)


def _cut(tokens: Tensor, logps: Tensor, settings: Decoding) -> list[Decoded]:
    # behind its end token a row holds whatever
    made, ends = [], set(settings.end_ids)
    for ids, row in zip(tokens.tolist(), logps.tolist(), strict=True):
        length = next((i + 1 for i, token in enumerate(ids) if token in ends), len(ids))
        made.append(Decoded(tuple(ids[:length]), tuple(row[:length])))
    return made


def _inner(model: nn.Module) -> Any:
    return model.get_base_model() if isinstance(model, PeftModel) else model


def _inputs(inner: nn.Module) -> frozenset[str]:
    return frozenset(signature(inner.forward).parameters)


@contextmanager
def _plain_generation(model: nn.Module) -> Iterator[None]:
    # `generate` fills unset fields from the model's own: penalties and beams from its repository
    # would bend the softmax that is sampled and recorded
    owner = _inner(model)
    asked = owner.generation_config
    owner.generation_config = GenerationConfig(decoder_start_token_id=asked.decoder_start_token_id)
    try:
        yield
    finally:
        owner.generation_config = asked
