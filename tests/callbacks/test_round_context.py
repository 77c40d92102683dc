from pathlib import Path

import pytest
from torch import nn

from tpmm_pl.callbacks import RoundContext
from tpmm_pl.trajectory import TrajectoryStore


@pytest.mark.parametrize("root", [".", "../run", None])
def test_log_probabilities_are_kept_beside_the_runs_folder_however_it_is_written(
    root: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    monkeypatch.chdir(run)
    store = TrajectoryStore(Path(root or run) / "trajectory")
    cache = RoundContext(nn.Identity(), store, 0).reference_cache
    assert cache.resolve() == tmp_path.resolve() / ".reference"
