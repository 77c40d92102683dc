"""Tiny models as folders, and what is in them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.models.tiny import tiny_tokenizer


def save(model: Any, folder: Path, **settings: Any) -> Path:
    """Write a model and its tokenizer as trainers do."""
    model.save_pretrained(folder, **settings)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def weights_of(folder: Path) -> dict[str, Tensor]:
    state: dict[str, Tensor] = load_file(folder / "model.safetensors")
    return state


def weighted(states: list[dict[str, Tensor]], weights: Any) -> dict[str, Tensor]:
    """The sum in float64."""
    return {
        name: sum(
            (w * s[name].double() for w, s in zip(weights, states, strict=True)),
            start=torch.zeros((), dtype=torch.float64),
        )
        for name in states[0]
    }


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor], atol: float = 1e-6) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name].double(), tensor, atol=atol, rtol=0, msg=name)
