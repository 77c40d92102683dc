from __future__ import annotations

from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from tests.report.written_runs import arms, config, gold, write_run
from tpmm_pl.report.drawing import drawing_style
from tpmm_pl.report.round_figures import margins_drawing
from tpmm_pl.report.scalars import read_scalars


def log(folder: Path, values: dict[int, float], name: str = "rewards/margins") -> None:
    with SummaryWriter(str(folder)) as writer:
        for step, value in values.items():
            writer.add_scalar(name, value, step)


def test_a_resumed_run_has_the_last_value_of_a_step(tmp_path: Path) -> None:
    log(tmp_path, {0: 1.0, 1: 2.0, 2: float("nan")})
    (first,) = tmp_path.iterdir()
    first.rename(tmp_path / "events.out.tfevents.0")
    log(tmp_path, {1: 3.0, 3: 4.0})
    log(tmp_path, {0: float("nan")}, name="rewards/chosen")
    names = ["rewards/margins", "rewards/chosen", "rewards/rejected"]
    assert read_scalars(tmp_path, names) == {"rewards/margins": {0: 1.0, 1: 3.0, 3: 4.0}}


def test_where_nothing_was_logged_there_is_nothing(tmp_path: Path) -> None:
    assert read_scalars(tmp_path / "tensorboard", ["rewards/margins"]) == {}


def test_rewards_are_drawn_over_steps_for_the_arms_that_logged_them(tmp_path: Path) -> None:
    found = arms(
        write_run(tmp_path / "a", config(0, "last"), gold(0.5)),
        write_run(tmp_path / "b", config(0, "ema"), gold(0.5)),
    )
    margins: dict[str, dict[int, float]] = {"rewards/margins": {0: 1.0, 5: 2.0}}
    logged: dict[str, list[dict[str, dict[int, float]]]] = {"last": [margins], "ema": [{}]}
    with drawing_style():
        drawing = margins_drawing(found, logged)
        assert margins_drawing(found, {"last": [{}], "ema": [{}]}) is None
    assert drawing is not None
    (axes,) = drawing.figure.axes
    line, _ = axes.lines
    assert (line.get_label(), list(line.get_ydata())) == ("last", [1.0, 2.0])  # type: ignore[arg-type]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("optimizer step", "reward margin, nats")
