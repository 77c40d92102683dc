from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric import Fabric
from lightning.pytorch import Trainer
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tests.models.tiny import EOS, tiny_llama, tiny_tokenizer
from tpmm_pl.data.batching import collate
from tpmm_pl.fabric import fit_with_fabric
from tpmm_pl.losses import dpo_loss
from tpmm_pl.models.scoring import PairScorer, score_pairs
from tpmm_pl.models.weights import materialise, save_policy
from tpmm_pl.modules.fusion import (
    OBJECTIVES,
    FusionSettings,
    FusionWeights,
    chosen_nll,
    fit_warning,
    length_normalised_ranking,
    scorer_dpo,
)
from tpmm_pl.trajectory import TrajectoryStore
from tpmm_pl.types import InputError, Pair, PairBatch, PairLogps, Recipe

# a training step outside of a fit has nobody to log to
pytestmark = pytest.mark.filterwarnings("ignore:You are trying to `self.log")

FABRIC = Fabric(accelerator="cpu", devices=1)


def policy() -> PreTrainedModel:
    return tiny_llama(seed=0)


def pairs(seed: int, count: int = 12) -> list[Pair]:
    """Labels that mean nothing: random tokens against random tokens."""
    generator = torch.Generator().manual_seed(seed)

    def tokens(length: int) -> tuple[int, ...]:
        return tuple(torch.randint(6, 32, (length,), generator=generator).tolist())

    return [
        Pair(f"p{i}", "", "", "", tokens(2), (*tokens(2 + i % 4), EOS), (*tokens(3), EOS))
        for i in range(count)
    ]


def scored(made: list[Pair]) -> PairBatch:
    batch = collate(made)
    batch.reference = score_pairs(policy(), made)
    return batch


TRAINED, HELD_OUT = pairs(seed=1), pairs(seed=2)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> TrajectoryStore:
    """The start and two rounds of DPO on the pairs ``TRAINED``, each further along."""
    made = TrajectoryStore(tmp_path_factory.mktemp("run") / "trajectory")
    model, batch = policy(), scored(TRAINED)
    save_policy(model, made, 0)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    for index in (1, 2):
        for _ in range(15):
            optimizer.zero_grad()
            dpo_loss(PairScorer(model)(batch), batch.reference, beta=0.5).mean().backward()
            optimizer.step()
        save_policy(model, made, index)
    return made


def bound(
    store: TrajectoryStore, snapshots: tuple[int, ...] = (0, 1, 2), **settings: Any
) -> FusionWeights:
    return FusionWeights(FusionSettings(**settings)).bind(policy(), store, snapshots)


def fit(module: FusionWeights, batches: Iterable[PairBatch]) -> FusionWeights:
    fit_with_fabric(FABRIC, module, [[batch] for batch in batches], title="fusion")
    return module


def fused(store: TrajectoryStore, made: list[Pair], steps: int = 20, **settings: Any) -> Tensor:
    module = fit(bound(store, tolerance=0.0, **settings), [scored(made)] * steps)
    return module.coefficients().detach()


def preference(store: TrajectoryStore, recipe: Recipe, made: list[Pair]) -> float:
    """The mean of D, how much a merge prefers the chosen completions."""
    model = policy()
    materialise(model, store, recipe)
    logps = score_pairs(model, made)
    return float((logps.chosen - logps.rejected).mean())


constraints = pytest.mark.parametrize("constraint", ["simplex", "affine"])


@constraints
@pytest.mark.parametrize("grouping", ["model", "layer"])
def test_a_fresh_module_is_the_plain_average(
    store: TrajectoryStore, constraint: str, grouping: str
) -> None:
    recipe = bound(store, constraint=constraint, grouping=grouping).recipe()
    for row in recipe.coefficients:
        assert row == pytest.approx((1 / 3,) * 3, abs=1e-7)


@constraints
@pytest.mark.parametrize("grouping", ["model", "layer", "block", "tensor"])
def test_rows_sum_to_1_whatever_was_learned(
    store: TrajectoryStore, constraint: str, grouping: str
) -> None:
    module = fit(bound(store, constraint=constraint, grouping=grouping), [scored(TRAINED)] * 4)
    sums = module.coefficients().sum(-1)
    torch.testing.assert_close(sums, torch.ones_like(sums), atol=1e-6, rtol=0)
    recipe = module.recipe()
    assert len(recipe.coefficients) == len(recipe.groups) == len(module.groups)
    for row in recipe.coefficients:
        assert sum(row) == pytest.approx(1, abs=1e-15 * 4)
    assert (recipe.strategy, recipe.snapshots, recipe.grouping) == ("learned", (0, 1, 2), grouping)


@constraints
def test_one_snapshot_gives_1(store: TrajectoryStore, constraint: str) -> None:
    module = bound(store, snapshots=(2,), constraint=constraint)
    assert module.recipe().coefficients == ((1.0,),)
    fit(module, [scored(TRAINED)] * 3)
    assert module.recipe().coefficients == ((1.0,),)
    assert fit_warning(module.recipe()) is None


@constraints
@pytest.mark.parametrize("grouping", ["model", "layer"])
def test_as_a_scorer_the_merge_learns_to_prefer_the_chosen(
    store: TrajectoryStore, constraint: str, grouping: str
) -> None:
    module = bound(store, constraint=constraint, grouping=grouping)
    before = preference(store, module.recipe(), TRAINED)
    fit(module, [scored(TRAINED)] * 10)
    assert preference(store, module.recipe(), TRAINED) > before + 0.1
    assert module.losses[-1] < module.losses[0]


@constraints
def test_in_the_references_slot_the_merge_would_learn_to_prefer_the_rejected(
    store: TrajectoryStore, constraint: str
) -> None:
    module = bound(store, constraint=constraint)
    module.objective = lambda merged, batch, beta: dpo_loss(batch.reference, merged, beta=beta)
    before = preference(store, module.recipe(), TRAINED)
    fit(module, [scored(TRAINED)] * 10)
    assert preference(store, module.recipe(), TRAINED) < before - 0.1
    assert module.losses[-1] < module.losses[0]


def test_pairs_that_snapshots_were_trained_on_make_the_newest_look_best(
    store: TrajectoryStore,
) -> None:
    leaked = fused(store, TRAINED, beta=0.5)[0]
    held_out = fused(store, HELD_OUT, beta=0.5)[0]
    assert leaked.argmax() == 2
    assert leaked[2] > 0.8
    assert held_out[2] < 1 / 3
    assert held_out.argmax() == 0


def test_the_default_rate_moves_and_the_usual_one_for_weights_does_not(
    store: TrajectoryStore,
) -> None:
    moved = fit(bound(store), [scored(TRAINED)] * 15).recipe()
    assert max(moved.coefficients[0]) > 0.5
    stuck = fit(bound(store, lr=1e-5), [scored(TRAINED)] * 15).recipe()
    assert stuck.coefficients[0] == pytest.approx((1 / 3,) * 3, rel=0.01)
    assert fit_warning(stuck) == (
        "fusion did not move: all 3 coefficients are within 1 % of uniform; "
        "raise its lr or its steps"
    )


def test_a_collapse_is_told_with_its_round() -> None:
    collapsed = Recipe("learned", (0, 1, 4), ((0.002, 0.003, 0.995),))
    sentence = fit_warning(collapsed)
    assert sentence is not None
    assert "fusion collapsed to the snapshot of round 4" in sentence
    assert "check that no snapshot was trained on the fuse pairs" in sentence


@pytest.mark.parametrize(
    "rows",
    [
        ((0.2, 0.3, 0.5),),
        ((0.34, 0.34, 0.32),),
        ((0.995, 0.005, 0.0), (0.3, 0.3, 0.4)),
        # an extrapolation is no single snapshot
        ((-0.4, 0.2, 1.2),),
    ],
)
def test_coefficients_between_uniform_and_one_snapshot_are_no_reason_to_warn(
    rows: tuple[tuple[float, ...], ...],
) -> None:
    groups = tuple(map(str, range(len(rows))))
    assert fit_warning(Recipe("learned", (0, 1, 2), rows, "layer", groups)) is None


def test_a_fit_ends_when_its_coefficients_rest(store: TrajectoryStore) -> None:
    batches = [scored(TRAINED)] * 12
    moving = fit(bound(store, tolerance=0.0), batches)
    assert len(moving.losses) == 12
    assert not moving.finished
    resting = fit(bound(store, tolerance=0.0, lr=1e-9), batches)
    assert not resting.finished  # a move below the tolerance, never one of exactly 0
    resting = fit(bound(store, lr=1e-9, patience=4), batches)
    assert resting.finished
    assert len(resting.losses) == 5


def test_every_step_starts_from_the_coefficients_and_not_from_the_module(
    store: TrajectoryStore,
) -> None:
    batch = scored(TRAINED)
    module = fit(bound(store, tolerance=0.0), [batch] * 3)
    before = Recipe("learned", (0, 1, 2), (tuple(module.path[1][0].tolist()),))
    model = policy()
    materialise(model, store, before)
    loss = scorer_dpo(PairScorer(model)(batch), batch, 0.1).mean()
    assert module.losses[2] == pytest.approx(loss.item(), abs=1e-6)


def test_the_loss_of_a_step_weighs_its_pairs(store: TrajectoryStore) -> None:
    batch = scored(TRAINED[:2])
    batch.weight = torch.tensor([2.0, 0.0])
    one = fit(bound(store), [batch])
    alone = fit(bound(store), [scored(TRAINED[:1])])
    assert one.losses == pytest.approx(alone.losses, abs=1e-6)
    torch.testing.assert_close(one.coefficients(), alone.coefficients())


def test_gradients_left_over_from_training_do_not_count(store: TrajectoryStore) -> None:
    results = []
    for stale in (False, True):
        model = policy()
        if stale:
            PairScorer(model)(scored(TRAINED)).rejected.sum().mul(100).backward()
        module = FusionWeights(FusionSettings(lr=0.01)).bind(model, store, (0, 1, 2))
        results.append(fit(module, [scored(TRAINED)] * 2).coefficients())
    assert torch.equal(*results)


def test_the_policys_parameters_keep_no_gradient_and_are_none_of_the_modules(
    store: TrajectoryStore,
) -> None:
    model = policy()
    module = FusionWeights().bind(model, store, (0, 1, 2))
    fit(module, [scored(TRAINED)])
    assert [name for name, _ in module.named_parameters()] == ["weights"]
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("objective", sorted(OBJECTIVES))
@constraints
def test_every_objective_improves_along_its_fit(
    store: TrajectoryStore, objective: str, constraint: str
) -> None:
    module = fit(bound(store, objective=objective, constraint=constraint), [scored(TRAINED)] * 10)
    assert module.losses[-1] < module.losses[0]
    assert (module.coefficients() - 1 / 3).abs().max() > 0.01


def test_the_objectives_by_hand() -> None:
    # completions of 2 and 1 tokens: -4 and -3 nats are -2 and -3 a token
    batch = collate([Pair("p", "", "", "", (6,), (7, EOS), (EOS,))])
    batch.reference = PairLogps(torch.tensor([-5.0]), torch.tensor([-2.0]))
    merged = PairLogps(torch.tensor([-4.0]), torch.tensor([-3.0]))
    # D is -1 under the merge and -3 under the start
    softplus = nn.functional.softplus
    assert scorer_dpo(merged, batch, 0.5).item() == pytest.approx(softplus(torch.tensor(-1.0)))
    ranking = length_normalised_ranking(merged, batch, 2.0)
    assert ranking.item() == pytest.approx(softplus(torch.tensor(-2.0)))
    assert chosen_nll(merged, batch, 7.0).item() == 2.0


class Given:
    """A source that gives the tiny policy."""

    def prepare(self) -> None:
        pass

    def load_model(self) -> PreTrainedModel:
        return policy()

    def load_tokenizer(self) -> PreTrainedTokenizerBase:
        return tiny_tokenizer()

    def describe(self) -> dict[str, Any]:
        return {}


def trainer(root: Path, **settings: Any) -> Trainer:
    return Trainer(
        default_root_dir=root,
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **{"accelerator": "cpu", **settings},
    )


def loader(batches: list[PairBatch]) -> DataLoader[list[PairBatch]]:
    steps = [[batch] for batch in batches]
    return DataLoader(steps, batch_size=None)  # type: ignore[arg-type]  # a list is a dataset


@pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers")
@pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated")
@constraints
def test_a_trainer_learns_the_coefficients_that_fabric_does(
    store: TrajectoryStore, constraint: str, tmp_path: Path
) -> None:
    batches = [scored(TRAINED), scored(HELD_OUT), scored(pairs(seed=3))]
    settings = FusionSettings(constraint=constraint, grouping="layer", tolerance=0.0)  # type: ignore[arg-type]
    alone = FusionWeights(settings, policy=Given(), run=store.root.parent)
    trainer(tmp_path, max_epochs=2).fit(alone, loader(batches))

    inside = fit(bound(store, constraint=constraint, grouping="layer", tolerance=0.0), batches * 2)
    assert torch.equal(alone.coefficients(), inside.coefficients())
    assert alone.losses == inside.losses
    assert len(alone.losses) == 6
    written = json.loads((tmp_path / "recipe.json").read_text())
    assert Recipe.from_json(written) == alone.recipe()
    assert written["loss"] == alone.losses


@pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers")
@pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated")
def test_a_trainer_ends_when_the_coefficients_rest_and_says_that_they_did_not_move(
    store: TrajectoryStore, tmp_path: Path
) -> None:
    settings = FusionSettings(lr=1e-9, patience=2)
    module = FusionWeights(settings, policy=Given(), run=store.root.parent)
    with pytest.warns(UserWarning, match="fusion did not move"):
        trainer(tmp_path, max_epochs=50).fit(module, loader([scored(TRAINED)]))
    assert len(module.losses) == 3


@pytest.mark.gpu
def test_a_trainer_on_an_accelerator_learns_the_same(
    store: TrajectoryStore, tmp_path: Path
) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no accelerator here")
    results = []
    for accelerator in ("cpu", "gpu"):
        module = FusionWeights(FusionSettings(), policy=Given(), run=store.root.parent)
        trainer(tmp_path, max_epochs=5, accelerator=accelerator).fit(
            module, loader([scored(TRAINED)])
        )
        results.append(module.coefficients().detach().cpu())
    torch.testing.assert_close(*results, atol=1e-3, rtol=0)


def test_a_fit_of_its_own_needs_a_finished_run(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="FusionWeights needs `run`"):
        FusionWeights().configure_model()
    module = FusionWeights(policy=Given(), run=tmp_path)
    with pytest.raises(InputError, match="holds no trajectory; give the folder of a finished run"):
        module.configure_model()


def test_adapters_are_fused_as_models_are(tmp_path: Path) -> None:
    # an adapter of full rank, then the same change written into the weights
    model = policy()
    adapted = get_peft_model(
        policy(), LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    )
    adapters, models = TrajectoryStore(tmp_path / "adapters"), TrajectoryStore(tmp_path / "models")
    generator = torch.Generator().manual_seed(0)
    for index in range(3):
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.data = 0.5 * torch.randn(parameter.shape, generator=generator)
        save_policy(adapted, adapters, index)
        changes = {
            name: module.get_delta_weight("default").detach()
            for name, module in adapted.get_base_model().named_modules()
            if hasattr(module, "get_delta_weight")
        }
        for name, change in changes.items():
            start = policy().get_parameter(f"{name}.weight").detach()
            model.get_parameter(f"{name}.weight").data = start + change
        save_policy(model, models, index)
    module = FusionWeights(FusionSettings(beta=0.5)).bind(adapted, adapters, (0, 1, 2))
    ours = fit(module, [scored(TRAINED)] * 5).coefficients()
    expected = fit(bound(models, beta=0.5), [scored(TRAINED)] * 5).coefficients()
    torch.testing.assert_close(ours, expected, atol=1e-4, rtol=0)
    assert (expected - 1 / 3).abs().max() > 0.05


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"objective": "dp"}, "unknown fusion objective 'dp'; did you mean dpo"),
        ({"grouping": "layers"}, "unknown group 'layers'; did you mean layer"),
        ({"beta": 0.0}, "must be positive"),
        ({"lr": -1.0}, "must be positive"),
        ({"lr": 0.0}, "must be positive"),
        ({"steps": 0}, "must be positive"),
        ({"batch_size": 0}, "must be positive"),
        ({"constraint": "sum"}, "unknown fusion constraint 'sum'"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        FusionSettings(**settings)
