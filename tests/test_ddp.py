"""Two processes that hold the whole model each end where one process ends."""

from __future__ import annotations

import os
import re
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, Strategy

from tests.two_processes import coefficients, exit_codes, fit, losses, together, weights
from tpmm_pl import cli
from tpmm_pl.callbacks import RoundContext, TrajectorySnapshot
from tpmm_pl.commands.train import refuse_other_form
from tpmm_pl.types import InputError


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("one")
    fit(root)
    return root


def assert_same_run(root: Path, one: Path) -> None:
    """Losses and coefficients to 1e-5, snapshots to 1e-4."""
    assert losses(root) == pytest.approx(losses(one), abs=1e-5)
    assert coefficients(root) == pytest.approx(coefficients(one), abs=1e-5)
    expected = weights(one)
    found = weights(root)
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name], atol=1e-4, rtol=0, msg=name)


def test_two_processes_end_where_one_ends(one: Path, tmp_path: Path) -> None:
    together(partial(fit, tmp_path, strategy="ddp", processes=2))
    assert_same_run(tmp_path, one)


LETTERS = {
    "--model.policy.hidden": 16,
    "--model.policy.layers": 2,
    "--model.policy.heads": 2,
    "--model.policy.ffn": 32,
    "--model.policy.steps": 30,
    "--model.rounds": 1,
    "--data.batch_size": 4,
    "--data.prompts_per_round": 16,
    "--data.start_fuse_prompts": 8,
    "--data.fuse_prompts_per_round": 8,
    "--data.evaluation_prompts": 4,
    "--pairs.samples": 4,
    "--pairs.max_new_tokens": 6,
    "--evaluation.max_new_tokens": 6,
    "--reference.fusion.steps": 2,
    "--reference.ship_steps": 2,
    "--trainer.devices": 2,
    "--trainer.strategy": "ddp",
}


def run_the_command(root: Path) -> None:
    """Run ``tpmm fit`` as one of two processes; what it prints goes to a file."""
    rank = os.environ["RANK"]
    sys.stdout = sys.stderr = (root / f"printed_{rank}").open("w", buffering=1)
    settings = {
        **LETTERS,
        "--model.policy.cache_dir": root / "start",
        "--trainer.default_root_dir": root / "run",
    }
    flags = [str(word) for setting in settings.items() for word in setting]
    sys.argv = ["tpmm", "fit", "--config", "configs/quickstart.yaml", *flags]
    cli.main()


def lose_the_second(root: Path) -> None:
    def die(self: TrajectorySnapshot, context: RoundContext) -> None:
        os._exit(9)

    if os.environ["RANK"] == "1":
        TrajectorySnapshot.snapshot = die  # type: ignore[method-assign]
    run_the_command(root)


def test_a_command_in_two_processes_prints_and_writes_once(tmp_path: Path) -> None:
    assert exit_codes(partial(run_the_command, tmp_path)) == [0, 0]
    first, second = ((tmp_path / f"printed_{rank}").read_text() for rank in range(2))
    assert "export: last, merged and best" in first
    assert not {"export", "figure", "round", "Warning"} & set(re.findall(r"\w+", second))
    assert (tmp_path / "run" / "finished.json").exists()


def test_a_process_that_dies_ends_the_others_with_a_sentence(tmp_path: Path) -> None:
    assert exit_codes(partial(lose_the_second, tmp_path)) == [1, 9]
    printed = (tmp_path / "printed_0").read_text()
    assert "error: another process of this run has ended" in printed
    assert "Traceback" not in printed


def test_a_checkpoint_of_another_form_is_refused_with_a_sentence(tmp_path: Path) -> None:
    file, folder = tmp_path / "file.ckpt", tmp_path / "folder.ckpt"
    file.write_text("")
    folder.mkdir()
    sharded = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)
    whole: Strategy = DDPStrategy()
    for checkpoint, strategy in ((file, sharded), (folder, whole)):
        with pytest.raises(InputError, match="cannot go on from it; resume with the trainer"):
            refuse_other_form(str(checkpoint), strategy)
    for known, strategy in ((str(file), whole), (str(folder), sharded), (None, sharded)):
        refuse_other_form(known, strategy)
