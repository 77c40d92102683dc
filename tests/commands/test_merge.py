"""``tpmm merge`` from the command line, on tiny models."""

from __future__ import annotations

import json
from collections.abc import Callable
from math import log
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

from tests.commands.saved_models import assert_close, save, weighted, weights_of
from tests.commands.test_experts import refused, run
from tests.models.tiny import (
    tiny_bert,
    tiny_gpt2,
    tiny_llama,
    tiny_reward_model,
    tiny_tokenizer,
)
from tpmm_pl.commands.merging import folder as written_folder

WEIGHTS = (0.2, 0.3, 0.5)
FLAGS = ["--weights", "0.2,0.3,0.5"]


def moved(make: Callable[[], Any], seed: int) -> Any:
    """A model whose weights have moved, each by its seed."""
    model = make()
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    return model


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("models")
    return [save(tiny_llama(seed=seed), root / f"m{seed}") for seed in range(3)]


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    file = tmp_path / "pairs.jsonl"
    rows = [
        {"prompt": f"w{i} w1 ", "chosen": f"w2 w{i % 7}", "rejected": f"w3 w{i % 5} w4"}
        for i in range(20)
    ]
    file.write_text("\n".join(json.dumps(row) for row in rows))
    return file


@pytest.mark.parametrize(
    ("make", "family"),
    [
        (tiny_llama, AutoModelForCausalLM),
        (lambda: tiny_llama(tied=True), AutoModelForCausalLM),
        (tiny_gpt2, AutoModelForCausalLM),
        (tiny_reward_model, AutoModelForSequenceClassification),
        (lambda: tiny_reward_model(labels=3), AutoModelForSequenceClassification),
        (tiny_bert, AutoModelForSequenceClassification),
    ],
    ids=["llama", "tied", "gpt2", "reward", "classifier", "encoder"],
)
def test_the_folder_loads_as_the_weighted_sum(
    make: Callable[[], Any], family: Any, tmp_path: Path
) -> None:
    made = [moved(make, seed) for seed in range(3)]
    folders = [save(model, tmp_path / f"m{seed}") for seed, model in enumerate(made)]
    assert run("merge", *folders, "--out", tmp_path / "out", *FLAGS) == 0
    found, info = family.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert type(found) is type(made[0])
    expected = weighted([dict(model.state_dict()) for model in made], WEIGHTS)
    assert_close(dict(found.state_dict()), expected)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.get_vocab() == tiny_tokenizer().get_vocab()
    assert tokenizer.chat_template == tiny_tokenizer().chat_template


def test_all_that_belongs_to_a_model_is_there(models: list[Path], tmp_path: Path) -> None:
    assert run("merge", *models, "--out", tmp_path / "out", *FLAGS) == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "README.md", "chat_template.jinja", "config.json", "generation_config.json",
        "model.safetensors", "recipe.json", "tokenizer.json", "tokenizer_config.json",
    ]  # fmt: skip
    recipe = json.loads((tmp_path / "out" / "recipe.json").read_text())
    assert recipe["sources"] == ["m0", "m1", "m2"], "paths are nobody else's concern"
    assert recipe["coefficients"] == [[0.2, 0.3, 0.5]]
    card = (tmp_path / "out" / "README.md").read_text()
    assert "- `m1`\n" in card
    assert str(tmp_path) not in card


@pytest.mark.parametrize("kept", [0, 1, 2])
def test_a_weight_of_1_on_one_source_returns_it_bit_for_bit(
    models: list[Path], kept: int, tmp_path: Path
) -> None:
    flags = ["--weights", ",".join(str(float(kept == k)) for k in range(3))]
    assert run("merge", *models, "--out", tmp_path / "out", *flags) == 0
    found, expected = weights_of(tmp_path / "out"), weights_of(models[kept])
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_without_weights_it_is_the_average_and_normalising_is_asked_for(
    models: list[Path], tmp_path: Path
) -> None:
    states = [weights_of(folder) for folder in models]
    assert run("merge", *models, "--out", tmp_path / "a") == 0
    assert_close(weights_of(tmp_path / "a"), weighted(states, [1 / 3] * 3))
    twos = ["--weights=1,-1,2"]
    assert run("merge", *models, "--out", tmp_path / "b", *twos) == 0
    assert_close(weights_of(tmp_path / "b"), weighted(states, [1, -1, 2]))
    assert run("merge", *models, "--out", tmp_path / "c", *twos, "--normalize") == 0
    assert_close(weights_of(tmp_path / "c"), weighted(states, [0.5, -0.5, 1]))


def test_a_moving_average_weighs_newer_sources_more(models: list[Path], tmp_path: Path) -> None:
    flags = ["--method", "ema", "--alpha", "0.6"]
    assert run("merge", *models, "--out", tmp_path / "out", *flags) == 0
    # 0.6 m2 + 0.4 (0.6 m1 + 0.4 m0)
    expected = weighted([weights_of(folder) for folder in models], [0.16, 0.24, 0.6])
    assert_close(weights_of(tmp_path / "out"), expected)


def test_files_of_any_form_are_read(models: list[Path], tmp_path: Path) -> None:
    sharded = save(tiny_llama(seed=0), tmp_path / "sharded", max_shard_size="5KB")
    assert (sharded / "model.safetensors.index.json").is_file()
    pickled = save(tiny_llama(seed=1), tmp_path / "pickled")
    (pickled / "model.safetensors").unlink()
    torch.save(tiny_llama(seed=1).state_dict(), pickled / "pytorch_model.bin")
    halves = save(tiny_llama(seed=2), tmp_path / "halves")
    state = weights_of(halves)
    (halves / "model.safetensors").unlink()
    names = list(state)
    parts = {"pytorch_model-1.bin": names[:7], "pytorch_model-2.bin": names[7:]}
    for file, of_file in parts.items():
        torch.save({name: state[name] for name in of_file}, halves / file)
    where = {name: file for file, of_file in parts.items() for name in of_file}
    (halves / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": where}))
    assert run("merge", *models, "--out", tmp_path / "a", *FLAGS) == 0
    assert run("merge", sharded, pickled, halves, "--out", tmp_path / "b", *FLAGS) == 0
    one, other = weights_of(tmp_path / "a"), weights_of(tmp_path / "b")
    assert all(torch.equal(other[name], tensor) for name, tensor in one.items())


def test_a_large_merge_is_written_as_several_files(
    models: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: Any = written_folder.write_folder.__kwdefaults__
    monkeypatch.setitem(settings, "largest", 5000)
    assert run("merge", *models, "--out", tmp_path / "out", *FLAGS) == 0
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 2
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    states = [weights_of(folder) for folder in models]
    assert_close(dict(found), weighted(states, WEIGHTS))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
def test_the_dtype_is_the_first_sources_or_the_one_asked_for(
    models: list[Path], dtype: str, tmp_path: Path
) -> None:
    model: Any = tiny_llama(seed=0)
    half = save(model.to(torch.bfloat16), tmp_path / "half")
    assert run("merge", half, *models[1:], "--out", tmp_path / "a", *FLAGS) == 0
    assert {t.dtype for t in weights_of(tmp_path / "a").values()} == {torch.bfloat16}
    given = ["--dtype", dtype]
    assert run("merge", *models, "--out", tmp_path / "b", *FLAGS, *given) == 0
    assert {t.dtype for t in weights_of(tmp_path / "b").values()} == {getattr(torch, dtype)}
    assert json.loads((tmp_path / "b" / "config.json").read_text())["dtype"] == dtype
    # summed before it is rounded
    expected = weighted([weights_of(folder) for folder in models], WEIGHTS)
    found = weights_of(tmp_path / "b")
    for name, tensor in expected.items():
        limit = tensor.abs().max() * torch.finfo(found[name].dtype).eps / 2 + 1e-7
        assert (found[name].double() - tensor).abs().max() <= limit


def test_a_tied_head_in_some_files_is_written_nowhere(tmp_path: Path) -> None:
    folders = [save(tiny_llama(seed=s, tied=True), tmp_path / f"m{s}") for s in range(2)]
    state = weights_of(folders[0])
    twin = {"lm_head.weight": state["model.embed_tokens.weight"].clone()}
    save_file({**state, **twin}, folders[0] / "model.safetensors", metadata={"format": "pt"})
    assert run("merge", *folders, "--out", tmp_path / "out") == 0
    assert "lm_head.weight" not in weights_of(tmp_path / "out")


def test_a_head_that_is_no_twin_is_not_dropped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = [save(tiny_llama(seed=s, tied=True), tmp_path / f"m{s}") for s in range(2)]
    state = weights_of(folders[1])
    apart = {"lm_head.weight": torch.zeros(32, 16)}
    save_file({**state, **apart}, folders[1] / "model.safetensors", metadata={"format": "pt"})
    sentence = refused(capsys, "merge", *folders, "--out", tmp_path / "out")
    assert "m1 has an extra tensor lm_head.weight (1 names differ) as in m0" in sentence


def test_counters_are_the_last_sources(models: list[Path], tmp_path: Path) -> None:
    folders = []
    for seed, folder in enumerate(models):
        copy = save(tiny_llama(seed=seed), tmp_path / folder.name)
        state = {**weights_of(folder), "steps": torch.tensor([seed, 7])}
        save_file(state, copy / "model.safetensors", metadata={"format": "pt"})
        folders.append(copy)
    assert run("merge", *folders, "--out", tmp_path / "out", "--dtype", "bfloat16") == 0
    assert weights_of(tmp_path / "out")["steps"].tolist() == [2, 7]


def test_task_vectors_start_at_the_base(models: list[Path], tmp_path: Path) -> None:
    states = [weights_of(folder) for folder in models]
    whole = ["--method", "dare", "--density", "1"]
    assert run("merge", *models, "--out", tmp_path / "a", *whole) == 0
    # without a base the first: m0 + (m1 - m0) / 2 + (m2 - m0) / 2
    assert_close(weights_of(tmp_path / "a"), weighted(states, [0, 0.5, 0.5]))
    given = ["--base", models[2], "--weights", "0.25,1"]
    assert run("merge", *models[:2], "--out", tmp_path / "b", *whole, *given) == 0
    assert_close(weights_of(tmp_path / "b"), weighted(states, [0.25, 1, -0.25]))
    assert json.loads((tmp_path / "b" / "recipe.json").read_text())["base"] == "m2"


def test_drawn_entries_are_those_of_the_seed(models: list[Path], tmp_path: Path) -> None:
    found: list[dict[str, Tensor]] = []
    for seed in (0, 0, 1):
        torch.rand(seed + 1)  # whatever was drawn before
        out = tmp_path / str(len(found))
        assert run("merge", *models, "--out", out, "--method", "dare", "--seed", seed) == 0
        found.append(weights_of(out))
    same, other = (all(torch.equal(found[0][n], found[k][n]) for n in found[0]) for k in (1, 2))
    assert same
    assert not other


def test_coefficients_are_learned_against_the_first_source(
    models: list[Path], pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--method", "learned", "--pairs", pairs, "--json"]
    out = tmp_path / "out"
    assert run("merge", *models, "--out", out, *given, "--grouping", "layer") == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["loss"] < printed["loss_uniform"]
    assert printed["groups"] == ["embeddings", "layer_00", "layer_01", "head"]
    assert [sum(row) for row in printed["coefficients"]] == pytest.approx([1.0] * 4)
    rows = dict(zip(printed["groups"], printed["coefficients"], strict=True))
    states, found = [weights_of(folder) for folder in models], weights_of(out)
    members = {"lm_head.weight": "head", "model.embed_tokens.weight": "embeddings"}
    for name, group in members.items():
        expected = weighted([{name: s[name]} for s in states], rows[group])
        assert_close({name: found[name]}, expected)
    # of the first source and itself the loss is log 2, whatever the coefficients
    assert run("merge", models[0], models[0], "--out", tmp_path / "same", *given) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["loss_uniform"] == pytest.approx(log(2), abs=1e-6)


def test_coefficients_of_reward_models_are_learned_too(
    pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = [save(moved(tiny_reward_model, seed), tmp_path / f"m{seed}") for seed in range(3)]
    given = ["--method", "learned", "--pairs", pairs, "--json"]
    assert run("merge", *folders, "--out", tmp_path / "out", *given) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["loss"] < printed["loss_uniform"]
    assert_close(
        weights_of(tmp_path / "out"),
        weighted([weights_of(folder) for folder in folders], printed["coefficients"][0]),
    )


def test_a_reader_is_told_the_coefficients(
    models: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("merge", *models, "--out", tmp_path / "out", *FLAGS) == 0
    assert capsys.readouterr().out.splitlines() == [
        "coefficients of m0, m1, m2",
        "  all weights: 0.2000 0.3000 0.5000",
        f"{tmp_path / 'out'}: linear merge of 3 models, float32",
    ]


def test_a_merge_that_is_cut_off_leaves_what_was_there(
    models: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    assert run("merge", *models, "--out", out) == 0
    before = weights_of(out)
    assert "exists; choose another --out" in refused(capsys, "merge", *models, "--out", out)
    made = written_folder.MergedTensors._made

    def stopped(self: Any, name: str, dtype: torch.dtype) -> Tensor:
        if "layers.1" in name:
            raise KeyboardInterrupt
        return made(self, name, dtype)

    with monkeypatch.context() as patched:
        patched.setattr(written_folder.MergedTensors, "_made", stopped)
        for place in (out, tmp_path / "new"):
            with pytest.raises(KeyboardInterrupt):
                run("merge", *models, "--out", place, "--overwrite", *FLAGS)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert all(torch.equal(weights_of(out)[name], tensor) for name, tensor in before.items())
    assert run("merge", *models, "--out", out, "--overwrite", *FLAGS) == 0
    assert not all(torch.equal(weights_of(out)[name], tensor) for name, tensor in before.items())


def test_help_has_the_options_and_what_they_do(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("merge", "--help") == 0
    printed = capsys.readouterr().out
    assert "--normalize " in printed
    assert "sources [sources ...]" in printed
