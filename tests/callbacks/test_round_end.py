from __future__ import annotations

import gc
import random
from collections import Counter
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from peft import PeftModel
from torch import nn

from tests.callbacks.letters_run import (
    FUSION,
    Fixed,
    context_of,
    fit,
    letters_pairs,
    round_pairs,
    snapshots,
)
from tests.models.tiny import tiny_gpt2, tiny_llama, tiny_tokenizer
from tpmm_pl.callbacks import (
    ReferenceMerge,
    RoundCallback,
    RoundCheckpoint,
    RoundContext,
    RoundEvaluation,
    TrajectorySnapshot,
    finish_round,
)
from tpmm_pl.callbacks.round_context import Stage
from tpmm_pl.callbacks.round_end import STAGES, reset_optimizer
from tpmm_pl.models.adapters import LoraSettings
from tpmm_pl.models.export import export_model
from tpmm_pl.models.load import PretrainedPolicy
from tpmm_pl.models.scoring import score_pairs
from tpmm_pl.models.weights import materialise, policy_state
from tpmm_pl.toy.judges import LettersGold
from tpmm_pl.toy.start import LettersPolicy
from tpmm_pl.trajectory import TrajectoryStore
from tpmm_pl.types import InputError, Recipe

_ONLY_LAST = {"ship", "evaluate_ship", "export"}
_ONLY_BETWEEN = {"next_policy", "pairs", "checkpoint", "retain"}
_IN_MEMORY = {"protect", "next_policy", "checkpoint", "retain"}


class Counting(RoundCallback):
    """Offers the stages of ``names`` and writes down their runs."""

    def __init__(self, names: list[str], runs: list[str]) -> None:
        super().__init__()
        self.names, self.runs = names, runs

    def stages(self) -> dict[str, Stage]:
        return {name: lambda context, name=name: self.runs.append(name) for name in self.names}  # type: ignore[misc]


class CountingSnapshot(TrajectorySnapshot):
    calls: Counter[int]

    def snapshot(self, context: RoundContext) -> None:
        self.calls[context.round_index] += 1
        super().snapshot(context)


def bare_context(root: Path, round_index: int = 1, *, final: bool = False) -> RoundContext:
    return RoundContext(nn.Linear(1, 1), TrajectoryStore(root), round_index, final=final)


@pytest.mark.parametrize("final", [False, True])
def test_stages_run_in_their_one_order(final: bool, tmp_path: Path) -> None:
    names, runs = list(STAGES), list[str]()
    random.Random(0).shuffle(names)
    context = bare_context(tmp_path, final=final)
    # a stage that loads something would need a snapshot: these load nothing
    finish_round([Counting(names[:5], runs), Counting(names[5:], runs)], context)
    left_out = _ONLY_BETWEEN if final else _ONLY_LAST
    assert runs == [name for name in STAGES if name not in left_out]


def test_a_stage_of_two_callbacks_runs_in_their_order(tmp_path: Path) -> None:
    runs = list[str]()
    first = Fixed("fuse", lambda context: runs.append("first"))
    second = Fixed("fuse", lambda context: runs.append("second"))
    finish_round([first, second], bare_context(tmp_path))
    assert runs == ["first", "second"]


def test_a_stage_that_is_complete_on_disk_is_not_run_again(tmp_path: Path) -> None:
    runs = list[str]()
    finish_round([Counting(list(STAGES), runs)], bare_context(tmp_path))
    runs.clear()
    finish_round([Counting(list(STAGES), runs)], bare_context(tmp_path))
    assert set(runs) == _IN_MEMORY
    runs.clear()
    finish_round([Counting(list(STAGES), runs)], bare_context(tmp_path, 2))
    assert set(runs) == set(STAGES) - _ONLY_LAST


def test_a_stage_that_failed_runs_again_and_those_before_it_do_not(tmp_path: Path) -> None:
    runs = list[str]()

    def fail(context: RoundContext) -> None:
        raise RuntimeError("cut off")

    before = Counting(["snapshot", "fuse_pairs"], runs)
    with pytest.raises(RuntimeError, match="cut off"):
        finish_round([before, Fixed("fuse", fail)], bare_context(tmp_path))
    again = Fixed("fuse", lambda context: runs.append("fuse"))
    finish_round([before, again], bare_context(tmp_path))
    assert runs == ["snapshot", "fuse_pairs", "fuse"]


def test_every_round_is_finished_once(start: LettersPolicy, tmp_path: Path) -> None:
    snapshot = CountingSnapshot()
    snapshot.calls = Counter()
    reference = ReferenceMerge("last", fusion=FUSION, ship_steps=1)
    store = fit(tmp_path, start, [snapshot, reference, letters_pairs()], epochs_per_round=2)
    assert snapshot.calls == {0: 1, 1: 1, 2: 1}
    assert [record.round for record in store.rounds] == [0, 1, 2]
    assert all(record.seconds["train"] > 0 for record in store.rounds[1:])


def test_a_folder_with_the_trajectory_of_another_run_is_refused(
    start: LettersPolicy, tmp_path: Path
) -> None:
    snapshots(tmp_path, start, 1)
    with pytest.raises(InputError, match="holds the trajectory of another run; resume that run"):
        fit(tmp_path, start, [TrajectorySnapshot(), ReferenceMerge("last"), letters_pairs()])


def test_a_checkpoint_without_its_trajectory_is_refused(
    start: LettersPolicy, tmp_path: Path
) -> None:
    def callbacks() -> list[Callback]:
        reference = ReferenceMerge("last", fusion=FUSION, ship_steps=1)
        return [TrajectorySnapshot(), reference, letters_pairs(), RoundCheckpoint()]

    fit(tmp_path / "run", start, callbacks())
    checkpoint = tmp_path / "run" / "checkpoints" / "last.ckpt"
    with pytest.raises(InputError, match=r"last\.ckpt has no .*manifest\.json"):
        fit(tmp_path / "other", start, callbacks(), ckpt_path=checkpoint)


def test_a_module_without_a_policy_is_refused(tmp_path: Path) -> None:
    trainer = Trainer(
        default_root_dir=tmp_path,
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        callbacks=[TrajectorySnapshot()],
    )
    with pytest.raises(InputError, match="Nothing has no attribute `policy` to snapshot"):
        trainer.fit(Nothing(), [0])


class Nothing(LightningModule):
    def configure_optimizers(self) -> None:
        return None

    def training_step(self, batch: Any, batch_idx: int) -> None:
        return None


class ParameterCount(Callback):
    """Counts the parameters that anything reachable from the module holds, while it trains."""

    def __init__(self) -> None:
        self.found: list[tuple[int, int]] = []

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx:
            return
        policy: Any = pl_module.policy
        own = sum(parameter.numel() for parameter in policy.parameters())
        self.found.append((own, _reachable_parameters(pl_module)))


def _reachable_parameters(root: object) -> int:
    waiting, seen, total = [root], {id(root)}, 0
    while waiting:
        one = waiting.pop()
        total += one.numel() if isinstance(one, nn.Parameter) else 0
        for other in gc.get_referents(one):
            if id(other) not in seen and not isinstance(other, type | ModuleType | FunctionType):
                seen.add(id(other))
                waiting.append(other)
    return total


def test_training_holds_one_model(start: LettersPolicy, tmp_path: Path) -> None:
    count = ParameterCount()
    reference = ReferenceMerge("learned", fusion=FUSION, guard_kl=None, ship_steps=1)
    evaluation = RoundEvaluation(LettersGold(), max_new_tokens=4)
    pairs = letters_pairs()
    fit(tmp_path, start, [TrajectorySnapshot(), reference, pairs, evaluation, count], rounds=3)
    assert len(count.found) == 3
    for own, found in count.found:
        assert found == own > 1000


def test_reference_log_probabilities_are_those_of_the_recipe(
    start: LettersPolicy, tmp_path: Path
) -> None:
    reference = ReferenceMerge("ema", ship_steps=1)
    store = fit(tmp_path, start, [TrajectorySnapshot(), reference, letters_pairs()], rounds=3)
    policy = start.load_model()
    for index in range(3):
        recipe, pairs = store.record(index).recipe, round_pairs(store, index)
        assert recipe is not None
        materialise(policy, store, recipe)
        logps = score_pairs(policy, pairs, token_budget=100)
        chosen = torch.tensor([pair.ref_chosen_logps for pair in pairs])
        rejected = torch.tensor([pair.ref_rejected_logps for pair in pairs])
        torch.testing.assert_close(chosen, logps.chosen, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(rejected, logps.rejected, rtol=1e-6, atol=1e-6)


def test_an_optimizer_that_is_reset_steps_as_a_new_one(tmp_path: Path) -> None:
    def model() -> nn.Linear:
        torch.manual_seed(0)
        return nn.Linear(3, 1)

    def step(layer: nn.Linear, optimizer: torch.optim.Optimizer, scale: float) -> None:
        optimizer.zero_grad()
        layer(torch.full((2, 3), scale)).square().sum().backward()
        optimizer.step()

    used, fresh = model(), model()
    optimizer = torch.optim.AdamW(used.parameters(), lr=0.1)
    for scale in (1.0, 3.0):
        step(used, optimizer, scale)
    used.load_state_dict(fresh.state_dict())
    reset_optimizer(optimizer)
    step(used, optimizer, 2.0)
    step(fresh, torch.optim.AdamW(fresh.parameters(), lr=0.1), 2.0)
    assert torch.equal(used.weight, fresh.weight)


@pytest.mark.parametrize("training", [True, False])
def test_what_trains_next_is_in_the_module_and_its_mode_is_kept(
    training: bool, start: LettersPolicy, tmp_path: Path
) -> None:
    context = snapshots(tmp_path, start, 1)
    context.policy.train(training)
    before = {name: p.detach().clone() for name, p in context.policy.named_parameters()}
    finish_round([Fixed("evaluate", lambda c: c.load(Recipe("initial", (0,))))], context)
    assert context.policy.training == training
    for name, parameter in context.policy.named_parameters():
        assert torch.equal(parameter, before[name]), name


def test_dropout_is_off_at_a_rounds_end(tmp_path: Path) -> None:
    policy, modes = tiny_gpt2(dropout=0.5).train(), list[bool]()
    context = RoundContext(policy, TrajectoryStore(tmp_path), 0)
    finish_round([Fixed("pairs", lambda c: modes.append(c.policy.training))], context)
    assert modes == [False]
    assert policy.training


@pytest.fixture
def lora(tmp_path: Path) -> PretrainedPolicy:
    export_model(tiny_llama(), tiny_tokenizer(), None, tmp_path / "model")
    return PretrainedPolicy(str(tmp_path / "model"), lora=LoraSettings(r=2, alpha=4))


def test_an_adapter_that_was_cut_to_its_rank_is_what_trains_next(
    lora: PretrainedPolicy, tmp_path: Path
) -> None:
    context = snapshots(tmp_path, lora, 2)
    logged: dict[str, float] = {}
    context.log = logged.update
    kept: list[dict[str, torch.Tensor]] = []

    def score_under_the_reference(context: RoundContext) -> None:
        kept.append({name: t.clone() for name, t in policy_state(context.policy).items()})
        recipe = context.store.record(2).recipe
        assert recipe is not None
        context.load(recipe)
        assert "merge" in context.policy.peft_config  # type: ignore[operator]

    callbacks = [ReferenceMerge("uniform"), Fixed("pairs", score_under_the_reference)]
    finish_round(callbacks, context)
    assert isinstance(context.policy, PeftModel)
    assert list(context.policy.peft_config) == [context.policy.active_adapter] == ["default"]
    assert all(p.requires_grad == ("lora_" in n) for n, p in context.policy.named_parameters())
    state = policy_state(context.policy)
    assert all(torch.equal(tensor, kept[0][name]) for name, tensor in state.items())
    assert 0 < logged["fusion/rank_error"] < 1
    assert context.store.record(2).notes["rank"].startswith("cut to the adapter's rank")


def test_random_draws_are_named_by_seed_round_and_stage(
    start: LettersPolicy, tmp_path: Path
) -> None:
    context = context_of(tmp_path, start, 3, seed=7)
    assert context.key("pairs") == "7/3/pairs"
    draws = [torch.rand(1, generator=context.generator(stage)) for stage in ("a", "a", "b")]
    assert draws[0] == draws[1] != draws[2]


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.RMSprop])
def test_an_optimizer_filled_with_zeros_steps_as_a_new_one(
    kind: type[torch.optim.Optimizer],
) -> None:
    def stepped(reset: bool) -> torch.Tensor:
        weight = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
        optimizer = kind([weight], lr=0.1)  # type: ignore[call-arg]
        if reset:
            weight.grad = torch.tensor([3.0, 4.0])
            optimizer.step()
            reset_optimizer(optimizer, in_place=True)
            weight.data.copy_(torch.tensor([1.0, -2.0]))
        weight.grad = torch.tensor([0.5, -1.0])
        optimizer.step()
        return weight.detach()

    assert torch.equal(stepped(True), stepped(False))


def test_an_optimizer_that_does_not_begin_at_zero_is_not_filled() -> None:
    optimizer = torch.optim.NAdam([torch.nn.Parameter(torch.ones(2))])
    with pytest.raises(InputError, match=r"^NAdam cannot start afresh on sharded weights"):
        reset_optimizer(optimizer, in_place=True)
