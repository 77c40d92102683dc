from __future__ import annotations

from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from tpmm_pl.data.batching import PairLoader, collate, fuse_loader, split_to
from tpmm_pl.data.packing import pad_tree
from tpmm_pl.types import InputError, Pair, PairBatch

Step = list[PairBatch]


def pair(index: int, chosen: int = 1, rejected: int = 1) -> Pair:
    return Pair(
        prompt_id=str(index),
        prompt="",
        chosen="",
        rejected="",
        prompt_ids=(index,),
        chosen_ids=(7,) * chosen,
        rejected_ids=(8,) * rejected,
    )


def loader(count: int = 10, **changes: Any) -> PairLoader:
    settings: dict[str, Any] = {"batch_size": 2, "seed": 1, "epoch": 0}
    return PairLoader([pair(index) for index in range(count)], **(settings | changes))


def prompts(step: Step) -> list[int]:
    """First tokens of the prompts of a step's pairs."""
    return [
        first
        for batch in step
        for first in pad_tree(batch.tree)[0][: len(batch.weight), 0].tolist()
    ]


def seen(batches: PairLoader) -> list[list[int]]:
    return [prompts(step) for step in batches]


def test_collate_writes_these_tensors() -> None:
    first = Pair(
        "a", "", "", "", (11, 12), (13,), (14, 15), weight=0.5, ref_chosen_logps=-1.0, margin=0.25
    )
    second = Pair("b", "", "", "", (21,), (22, 23, 1), (24,), ref_rejected_logps=-2.0)
    batch = collate([first, second])
    # 11 12 13, 11 12 14 15, 21 22 23 1, 21 24
    assert batch.tree.tokens.tolist() == [11, 12, 13, 14, 15, 21, 22, 23, 1, 24]
    assert batch.tree.positions.tolist() == [0, 1, 2, 2, 3, 0, 1, 2, 3, 1]
    assert batch.tree.ends.tolist() == [5, 5, 3, 5, 5, 10, 9, 9, 9, 10]
    assert batch.tree.leaves.tolist() == [2, 8, 4, 9]
    assert batch.tree.states.tolist() == [1, 3, 5, 6, 7]
    assert batch.tree.targets.tolist() == [13, 22, 23, 1, 14, 15, 24]
    assert batch.tree.state_of.tolist() == [0, 2, 3, 4, 0, 1, 2]
    assert batch.tree.row_of.tolist() == [0, 1, 1, 1, 2, 2, 3]
    ids, mask = pad_tree(batch.tree, 1)
    assert ids.tolist() == [
        [11, 12, 13, 1],
        [21, 22, 23, 1],
        [11, 12, 14, 15],
        [21, 24, 1, 1],
    ]
    assert mask.tolist() == [[1, 1, 1, 0], [1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 0, 0]]
    assert batch.weight.tolist() == [0.5, 1.0]
    assert batch.margin.tolist() == [0.25, 0.0]
    assert batch.reference.chosen[0] == -1.0
    assert batch.reference.rejected[1] == -2.0
    assert batch.reference.chosen[1].isnan()
    assert {tensor.dtype for tensor in batch.tree} == {torch.int64}
    floats = {batch.weight.dtype, batch.reference.chosen.dtype, batch.margin.dtype}
    assert floats == {torch.float32}


def test_fuse_batches_go_through_all_pairs_before_one_comes_again() -> None:
    pairs = [pair(index) for index in range(6)]

    def steps(seed: int, **changes: Any) -> list[Step]:
        generator = torch.Generator().manual_seed(seed)
        settings = {"batch_size": 2, "steps": 7, "generator": generator} | changes
        return [*fuse_loader(pairs, **settings)]  # type: ignore[arg-type]

    order = [prompts(step) for step in steps(1)]
    assert [len(step) for step in order] == [2] * 7
    assert sorted(chain(*order[:3])) == sorted(chain(*order[3:6])) == list(range(6))
    assert order[:3] != order[3:6]
    assert [prompts(step) for step in steps(1, token_budget=3)] == order
    assert [len(step) for step in steps(1, token_budget=3)] == [2] * 7
    assert [prompts(step) for step in steps(2)] != order
    assert [len(prompts(step)) for step in steps(1, batch_size=9)] == [6] * 7


def test_an_epoch_shows_every_pair_once_and_epochs_differ() -> None:
    first, second = seen(loader()), seen(loader(epoch=1))
    assert sorted(chain(*first)) == sorted(chain(*second)) == list(range(10))
    assert first != second
    assert seen(loader(seed=2)) != first


def test_the_order_depends_on_seed_and_epoch_only() -> None:
    first = seen(loader())
    torch.manual_seed(99)
    batches = loader()
    assert seen(batches) == seen(batches) == first
    assert seen(loader(seed=0, epoch=1)) != first


def test_the_token_budget_cuts_steps_and_leaves_their_pairs_alone() -> None:
    whole, cut = loader(), loader(token_budget=3)
    assert seen(whole) == seen(cut)
    assert {len(step) for step in whole} == {1}
    assert {len(step) for step in cut} == {2}
    assert whole.state_dict() == cut.state_dict()


def test_iterating_leaves_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    seen(loader())
    assert torch.equal(torch.get_rng_state(), before)


def test_without_shuffling_pairs_keep_their_order() -> None:
    assert seen(loader(5, shuffle=False)) == [[0, 1], [2, 3]]


def test_fewer_pairs_than_a_batch_make_one_smaller_batch() -> None:
    assert seen(loader(3, batch_size=8, shuffle=False)) == [[0, 1, 2]]
    small = loader(5, batch_size=8, shuffle=False, world_size=2, rank=1)
    other = loader(5, batch_size=8, shuffle=False, world_size=2, rank=0)
    # of equal length: dealt out there and back
    assert (seen(other), seen(small)) == ([[0, 3]], [[1, 2]])
    assert len(small) == 1


@pytest.mark.parametrize("count", [2, 3, 4, 7, 8, 13, 16])
def test_ranks_together_see_what_one_process_with_the_global_batch_sees(count: int) -> None:
    ranks = [seen(loader(count, world_size=2, rank=rank)) for rank in range(2)]
    whole = seen(loader(count, batch_size=4))
    assert len(ranks[0]) == len(ranks[1]) == len(whole)
    for left, right, together in zip(*ranks, whole, strict=True):
        assert len(left) == len(right)
        # one process takes an odd small rest whole, two take equal shares of it
        assert sorted(left + right) == sorted(together[: len(left + right)])


@pytest.mark.parametrize("world_size", [2, 4])
def test_pairs_that_grow_evenly_are_shared_to_the_token(world_size: int) -> None:
    pairs = [pair(index, chosen=1 + index) for index in range(8)]
    made: dict[str, Any] = {"batch_size": 8 // world_size, "seed": 1, "epoch": 0}
    for rank in range(world_size):
        (share,) = seen(PairLoader(pairs, rank=rank, world_size=world_size, **made))
        assert sum(1 + index for index in share) == 36 / world_size


@settings(deadline=None, max_examples=100)
@given(
    st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40)), min_size=4, max_size=40),
    st.integers(1, 4),
    st.integers(2, 4),
    st.integers(0, 9),
)
def test_ranks_get_as_many_pairs_and_nearly_as_many_tokens(
    lengths: list[tuple[int, int]], batch_size: int, world_size: int, epoch: int
) -> None:
    pairs = [pair(index, *counts) for index, counts in enumerate(lengths)]
    made: dict[str, Any] = {"seed": 1, "epoch": epoch}
    ranks = [
        seen(PairLoader(pairs, batch_size=batch_size, rank=rank, world_size=world_size, **made))
        for rank in range(world_size)
    ]
    whole = seen(PairLoader(pairs, batch_size=batch_size * world_size, **made))
    tokens = [1 + chosen + rejected for chosen, rejected in lengths]
    assert {len(steps) for steps in ranks} == {len(whole)}
    for together, *shares in zip(whole, *ranks, strict=True):
        (size,) = {len(share) for share in shares}
        used = together[: size * world_size]
        assert sorted(chain(*shares)) == sorted(used)
        assert len(together) - len(used) < world_size, "only what cannot be shared is left out"
        # dealt out from the longest, ranks differ by no more than the longest and shortest pair
        sums = [sum(tokens[index] for index in share) for share in shares]
        each = [tokens[index] for index in used]
        assert max(sums) - min(sums) <= max(each) - min(each)


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40)), min_size=8, max_size=24),
    st.integers(2, 4),
    st.integers(1, 120),
)
def test_ranks_cut_a_step_into_as_many_micro_batches(
    lengths: list[tuple[int, int]], world_size: int, token_budget: int
) -> None:
    pairs = [pair(index, *counts) for index, counts in enumerate(lengths)]
    made: dict[str, Any] = {"batch_size": 2, "seed": 1, "epoch": 0, "token_budget": token_budget}
    ranks = [
        [*PairLoader(pairs, rank=rank, world_size=world_size, **made)] for rank in range(world_size)
    ]
    for steps in zip(*ranks, strict=True):
        assert len({len(step) for step in steps}) == 1
        for step in steps:
            assert all(len(micro.weight) for micro in step)
            whole = [micro for micro in step if len(micro.weight) > 1]
            assert all(len(micro.tree.tokens) <= token_budget for micro in whole)


def test_parts_are_halved_until_there_are_enough() -> None:
    assert split_to([[1, 2, 3, 4, 5], [6]], 2) == [[1, 2, 3, 4, 5], [6]]
    assert split_to([[1, 2, 3, 4, 5], [6]], 4) == [[1, 2], [3], [4, 5], [6]]


def test_fewer_pairs_than_processes_are_refused() -> None:
    with pytest.raises(InputError, match=r"1 pairs cannot be shared by 2 processes; give more"):
        loader(1, world_size=2)
    with pytest.raises(InputError, match=r"0 pairs cannot be shared by 1 processes"):
        loader(0)


@pytest.mark.parametrize("done", [0, 1, 3, 4])
def test_a_loaded_state_goes_on_at_the_next_batch(done: int) -> None:
    whole = seen(loader())
    broken = loader()
    iterator = iter(broken)
    assert [prompts(next(iterator)) for _ in range(done)] == whole[:done]
    resumed = loader()
    resumed.load_state_dict(broken.state_dict())
    iter(resumed)  # an iterator thrown away must not use up the start
    assert resumed.state_dict() == broken.state_dict()
    assert len(resumed) == 5
    assert seen(resumed) == whole[done:]
    assert seen(resumed) == whole, "only the first iteration is shortened"


def test_the_state_of_a_finished_epoch_begins_a_new_one() -> None:
    finished = loader()
    whole = seen(finished)
    assert finished.state_dict()["yielded"] == 5
    resumed = loader()
    resumed.load_state_dict(finished.state_dict())
    assert seen(resumed) == whole


@pytest.mark.parametrize(
    "changes", [{"batch_size": 4}, {"seed": 3}, {"epoch": 2}, {"world_size": 2}, {"count": 9}]
)
def test_the_state_of_another_order_is_refused(changes: dict[str, int]) -> None:
    name = next(iter(changes)).replace("count", "pairs")
    with pytest.raises(InputError, match=rf"with {name} \d+, now it is \d+; resume with the same"):
        loader(**changes).load_state_dict(loader().state_dict())


class Recorder(LightningModule):
    """Notes the prompts of every batch it trains on; makes a new loader every epoch."""

    def __init__(self, stop_after: int | None = None) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 1)
        self.seen: list[tuple[int, list[int]]] = []
        self.stop_after = stop_after
        self.loaders: list[PairLoader] = []

    def train_dataloader(self) -> PairLoader:
        self.loaders.append(loader(epoch=self.trainer.current_epoch))
        return self.loaders[-1]

    def training_step(self, batch: Step, _: int) -> torch.Tensor:
        self.seen.append((self.current_epoch, prompts(batch)))
        loss: torch.Tensor = self.layer(batch[0].weight[:, None]).sum()
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Killed(Exception):
    pass


class KillAfter(Callback):
    """Ends the process' work between two batches, behind the checkpoint."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            raise Killed


def trainer(folder: Path, *callbacks: Callback, epochs: int = 3) -> Trainer:
    return Trainer(
        default_root_dir=folder,
        max_epochs=epochs,
        accelerator="cpu",
        callbacks=[*callbacks],
        logger=False,
        enable_checkpointing=bool(callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        reload_dataloaders_every_n_epochs=1,
    )


# 5 batches an epoch; 5 is a checkpoint on an epoch's last batch
@pytest.mark.parametrize("step", [1, 3, 4, 5, 6, 8, 10])
def test_a_trainer_stopped_after_any_batch_trains_on_the_same_batches(
    tmp_path: Path, step: int
) -> None:
    unbroken = Recorder()
    trainer(tmp_path).fit(unbroken)
    assert len(unbroken.seen) == 15

    broken = Recorder()
    save = ModelCheckpoint(tmp_path, every_n_train_steps=1, save_top_k=-1, filename="{step}")
    with pytest.raises(Killed):
        trainer(tmp_path, save, KillAfter(step)).fit(broken)
    assert len(broken.seen) == step

    resumed = Recorder()
    trainer(tmp_path).fit(resumed, ckpt_path=tmp_path / f"step={step}.ckpt")
    assert broken.seen + resumed.seen == unbroken.seen
    assert resumed.trainer.global_step == 15


def test_a_checkpoint_between_epochs_goes_on_with_the_next_epoch(tmp_path: Path) -> None:
    unbroken = Recorder()
    trainer(tmp_path).fit(unbroken)
    save = ModelCheckpoint(tmp_path, every_n_epochs=1, save_on_train_epoch_end=True, filename="end")
    first = Recorder()
    trainer(tmp_path, save, epochs=1).fit(first)
    resumed = Recorder()
    trainer(tmp_path).fit(resumed, ckpt_path=tmp_path / "end.ckpt")
    assert first.seen + resumed.seen == unbroken.seen


def test_the_trainer_uses_the_loader_itself(tmp_path: Path) -> None:
    module = Recorder()
    runner = trainer(tmp_path, epochs=1)
    runner.fit(module)
    assert runner.train_dataloader is module.loaders[0]
    assert runner.num_training_batches == 5
