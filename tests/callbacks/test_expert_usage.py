from __future__ import annotations

from math import log
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tpmm_pl.callbacks import ExpertUsage
from tpmm_pl.callbacks.expert_usage import usage_metrics
from tpmm_pl.moe.routing import Routing
from tpmm_pl.types import InputError


def routing(counts: list[int]) -> Routing:
    loads = torch.tensor(counts)
    return Routing(
        importance=loads.float(),
        load=loads.float(),
        counts=loads,
        gate_entropy=torch.tensor(log(len(counts))),
        weight=torch.ones(len(counts) + 1) / (len(counts) + 1),
        tokens=torch.tensor(sum(counts)),
    )


def test_load_is_a_share_and_its_variation_is_0_when_even() -> None:
    even = usage_metrics({"a": routing([3, 3, 3, 3])})
    assert even["experts/00/load_00"] == 0.25
    assert even["experts/00/load_cv"] == 0
    assert even["experts/00/gate_entropy"] == pytest.approx(log(4))
    # 6, 2: mean 4, deviation 2
    skewed = usage_metrics({"a": routing([1, 1]), "b": routing([6, 2])})
    assert skewed["experts/01/load_00"] == 0.75
    assert skewed["experts/01/load_cv"] == pytest.approx(0.5)


def dead(usage: ExpertUsage, counts: list[int]) -> list[tuple[str, int]]:
    usage._count({"a": routing(counts)})
    return usage.dead_experts()


def test_an_expert_is_dead_only_after_a_whole_window_without_tokens() -> None:
    usage = ExpertUsage(dead_after=3)
    assert dead(usage, [5, 0]) == []
    assert dead(usage, [5, 1]) == []
    assert dead(usage, [5, 0]) == []  # one token in the window
    for _ in range(2):
        assert dead(usage, [5, 0]) == []
    assert dead(usage, [5, 0]) == [("a", 1)]


def test_a_dead_expert_is_told_once() -> None:
    usage = ExpertUsage(dead_after=1)
    assert dead(usage, [0, 1]) == [("a", 0)]
    assert dead(usage, [0, 1]) == []


class Recorder:
    def __init__(self) -> None:
        self.entries: list[tuple[int, dict[str, float]]] = []

    def log_metrics(self, metrics: dict[str, float], step: int) -> None:
        self.entries.append((step, metrics))


def step(usage: ExpertUsage, module: Any, recorder: Recorder, number: int) -> None:
    trainer: Any = SimpleNamespace(global_step=number, loggers=[recorder])
    usage.on_train_batch_end(trainer, module, None, None, 0)


def test_entries_come_every_n_steps() -> None:
    usage, recorder = ExpertUsage(every_n_steps=2), Recorder()
    for number in (1, 2, 3, 4):
        step(usage, SimpleNamespace(routings={"a": routing([1, 1])}), recorder, number)
    assert [number for number, _ in recorder.entries] == [2, 4]


def test_batches_whose_gradients_are_accumulated_are_one_step() -> None:
    usage, recorder = ExpertUsage(every_n_steps=1, dead_after=1), Recorder()
    for number, counts in ((0, [1, 0]), (1, [0, 1]), (1, [1, 0]), (2, [0, 1])):
        # no warning: each expert has a token in every step
        step(usage, SimpleNamespace(routings={"a": routing(counts)}), recorder, number)
    assert [number for number, _ in recorder.entries] == [1, 2]


def test_a_dead_expert_is_a_warning_with_a_way_out() -> None:
    module = SimpleNamespace(routings={"layers.0.mlp": routing([0, 4])})
    with pytest.warns(UserWarning, match="expert 0 of layers.0.mlp got no token in 1 steps; raise"):
        step(ExpertUsage(dead_after=1), module, Recorder(), 1)


def test_a_module_without_routings_is_refused() -> None:
    with pytest.raises(InputError, match="SimpleNamespace has no attribute `routings`"):
        step(ExpertUsage(), SimpleNamespace(), Recorder(), 1)


def test_windows_are_positive() -> None:
    with pytest.raises(InputError, match="dead_after 0 must be at least 1"):
        ExpertUsage(dead_after=0)
