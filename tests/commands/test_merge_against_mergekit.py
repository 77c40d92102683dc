"""``tpmm merge`` gives what mergekit gives: sums to the last bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.commands.test_experts import run
from tests.models.tiny import tiny_llama

pytest.importorskip("mergekit")

WIDE = {"dtype": "float32"}


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=str)
def models(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return saved(tmp_path_factory.mktemp("models"), request.param)


def saved(root: Path, dtype: torch.dtype) -> list[Path]:
    folders = [root / f"m{seed}" for seed in range(3)]
    for seed, folder in enumerate(folders):
        model: Any = tiny_llama(seed=seed)
        model.to(dtype).save_pretrained(folder)
    return folders


def by_mergekit(out: Path, method: str, models: list[dict[str, Any]], **config: Any) -> Any:
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    written = {"merge_method": method, "models": models, **config}
    options = MergeOptions(copy_tokenizer=False, quiet=True)
    run_merge(MergeConfiguration.model_validate(written), str(out), options)
    (file,) = out.glob("*.safetensors")
    return load_file(file)


def ours(out: Path, *arguments: object) -> Any:
    assert run("merge", *arguments, "--out", out) == 0
    return load_file(out / "model.safetensors")


def assert_bits(found: Any, expected: Any) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize(
    ("weights", "normalise"),
    [((1.0, 1.0, 1.0), True), ((0.2, 0.3, 0.5), False), ((2.0, -0.7, 0.4), True)],
)
def test_linear_merges_agree_to_the_last_bit(
    models: list[Path], weights: tuple[float, ...], normalise: bool, tmp_path: Path
) -> None:
    parts = [
        {"model": str(folder), "parameters": {"weight": weight}}
        for folder, weight in zip(models, weights, strict=True)
    ]
    expected = by_mergekit(tmp_path / "k", "linear", parts, parameters={"normalize": normalise})
    flags = [f"--weights={','.join(map(str, weights))}", *(["--normalize"] if normalise else [])]
    if set(weights) == {1.0}:
        flags = []
    assert_bits(ours(tmp_path / "t", *models, *flags), expected)


@pytest.mark.parametrize("asked", [WIDE, {"out_dtype": "bfloat16"}], ids=str)
def test_another_dtype_agrees_to_the_last_bit(
    models: list[Path], asked: dict[str, str], tmp_path: Path
) -> None:
    parts = [{"model": str(folder), "parameters": {"weight": 1.0}} for folder in models]
    expected = by_mergekit(tmp_path / "k", "linear", parts, **asked)
    (dtype,) = asked.values()
    assert_bits(ours(tmp_path / "t", *models, "--dtype", dtype), expected)


def assert_close(found: Any, expected: Any) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, atol=1e-6, rtol=0, msg=name)


def test_points_of_the_arc_agree(models: list[Path], tmp_path: Path) -> None:
    names = [str(folder) for folder in models[:2]]
    expected = by_mergekit(
        tmp_path / "k", "slerp", [{"model": name} for name in names],
        base_model=names[0], parameters={"t": 0.3}, **WIDE,
    )  # fmt: skip
    flags = ["--method", "slerp", "--t", 0.3, "--dtype", "float32"]
    assert_close(ours(tmp_path / "t", *names, *flags), expected)


def test_elected_signs_agree(tmp_path: Path) -> None:
    # rounded weights have equal entries, of which mergekit keeps some by their places
    names = [str(folder) for folder in saved(tmp_path, torch.float32)]
    parts = [{"model": n, "parameters": {"weight": 1.0, "density": 0.3}} for n in names[1:]]
    expected = by_mergekit(
        tmp_path / "k", "ties", parts, base_model=names[0], parameters={"normalize": True}, **WIDE
    )
    flags = ["--method", "ties", "--density", 0.3]
    assert_close(ours(tmp_path / "t", *names, *flags), expected)
