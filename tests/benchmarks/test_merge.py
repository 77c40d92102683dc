"""The comparison with mergekit compares what it says; no test asserts a timing."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.benchmarks.test_benchmarks import FOLDER, load

pytest.importorskip("mergekit")

script, fusion = load("merge"), load("fusion")
TINY = fusion.Shape(hidden=16, layers=2, heads=2, kv_heads=1, ffn=32, vocabulary=64)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    assert script.write_checkpoints(folder, 4, TINY) == 4 * (64 * 16 + parameters_of_two_layers())
    return folder


def parameters_of_two_layers() -> int:
    attention, ffn, norms = 2 * 16 * 16 + 2 * 16 * 8, 3 * 16 * 32, 2 * 16
    return 2 * (attention + ffn + norms) + 16


@pytest.mark.parametrize("name", list(script.CASES))
def test_both_programs_make_the_same_merge(name: str, root: Path) -> None:
    for way in script.WAYS:
        spent = script.child(way, name, root)
        assert spent.peak >= spent.added >= 0
    largest, odd = script.differences(*(script.out_folder(root, way, name) for way in script.WAYS))
    assert largest <= 1e-6
    if name in ("average", "weighted"):
        assert odd == 0


def test_differences_are_counted(tmp_path: Path) -> None:
    for name, last in (("a", 3.0), ("b", 3.5)):
        (tmp_path / name).mkdir()
        save_file({"w": torch.tensor([1.0, last])}, tmp_path / name / "model.safetensors")
    assert script.differences(tmp_path / "a", tmp_path / "b") == (0.5, 1)
    save_file({"v": torch.zeros(2)}, tmp_path / "b" / "model.safetensors")
    with pytest.raises(ValueError, match="differ in"):
        script.differences(tmp_path / "a", tmp_path / "b")


@pytest.mark.slow
def test_the_quick_form_writes_ratios_and_settings(tmp_path: Path) -> None:
    out, page = tmp_path / "out.json", tmp_path / "page.md"
    page.write_text("<!-- merge_quick -->\n<!-- /merge_quick -->\n")
    command = [sys.executable, str(FOLDER / "merge.py"), "--quick", "--repeats", "1"]
    command += ["--merges", "average", "--json", str(out), "--write", str(page)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    written = json.loads(out.read_text(encoding="utf-8"))
    assert set(written) == {"ratios", "settings"}
    assert written["ratios"]["average_max_difference"] == 0
    assert written["settings"]["quick"] is True
    assert "NOT MET" not in page.read_text(encoding="utf-8")
