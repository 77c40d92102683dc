import copy
import errno
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from tests.models.tiny import tiny_llama
from tpmm_pl.data.table import as_table
from tpmm_pl.models import reference_cache
from tpmm_pl.models.reference_cache import cached_logps
from tpmm_pl.models.scoring import score_pairs, score_shared
from tpmm_pl.types import Pair, PairLogps

PAIRS = [
    Pair("a", "", "", "", (5, 6, 7), (8, 9), (10, 11, 12)),
    Pair("b", "", "", "", (5, 6), (13,), (14, 15)),
]


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Count the passes over pairs."""
    found: list[int] = []

    def counting(*args: object, **options: object) -> PairLogps:
        found.append(1)
        return score_shared(*args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(reference_cache, "score_shared", counting)
    return found


def score(model: nn.Module, folder: Path, pairs: list[Pair] = PAIRS) -> PairLogps:
    return cached_logps(model, as_table(pairs), folder)


def test_a_hit_is_exact_and_costs_no_pass(tmp_path: Path, passes: list[int]) -> None:
    model = tiny_llama()
    fresh = score(model, tmp_path)
    known = score(tiny_llama(), tmp_path)
    assert len(passes) == 1
    assert torch.equal(torch.stack(fresh), torch.stack(known))
    assert torch.equal(torch.stack(fresh), torch.stack(score_pairs(model, PAIRS)))


def nudge(model: nn.Module) -> None:
    with torch.no_grad():
        next(model.parameters()).view(-1)[0].add_(1e-7)


def other_base(model: nn.Module) -> None:
    model.config.rope_parameters["rope_theta"] = 5.0  # type: ignore[union-attr, index, operator]


@pytest.mark.parametrize("change", [nudge, other_base, lambda model: model.double()])
def test_another_model_misses(
    change: Callable[[nn.Module], None], tmp_path: Path, passes: list[int]
) -> None:
    score(tiny_llama(), tmp_path)
    changed = tiny_llama()
    change(changed)
    score(changed, tmp_path)
    assert len(passes) == 2


@pytest.mark.parametrize(
    "change",
    [
        {"chosen_ids": (8, 10)},
        {"prompt_ids": (5, 6), "chosen_ids": (7, 8, 9)},
        {"chosen_ids": (10, 11, 12), "rejected_ids": (8, 9)},
    ],
)
def test_other_tokens_miss(
    change: dict[str, tuple[int, ...]], tmp_path: Path, passes: list[int]
) -> None:
    score(tiny_llama(), tmp_path)
    score(tiny_llama(), tmp_path, [replace(PAIRS[0], **change), PAIRS[1]])  # type: ignore[arg-type]
    assert len(passes) == 2


def test_texts_scores_and_weights_do_not_matter(tmp_path: Path, passes: list[int]) -> None:
    score(tiny_llama(), tmp_path)
    score(tiny_llama(), tmp_path, [replace(p, prompt="x", score_chosen=1.0) for p in PAIRS])
    assert len(passes) == 1


def test_parts_and_swapped_labels_have_entries_of_their_own(tmp_path: Path) -> None:
    model, table = tiny_llama(), as_table(PAIRS)
    for part in (table, table.select([1]), table.flipped([0]), table.select([1, 0])):
        known = cached_logps(model, part, tmp_path)
        assert torch.equal(torch.stack(known), torch.stack(score_pairs(model, part)))
    assert len(list(tmp_path.iterdir())) == 4


def test_autocast_and_scales_of_adapters_miss(tmp_path: Path, passes: list[int]) -> None:
    def adapted(alpha: int) -> nn.Module:
        torch.manual_seed(0)
        settings = LoraConfig(r=2, lora_alpha=alpha, target_modules=["q_proj"])
        return get_peft_model(tiny_llama(), settings)

    score(adapted(2), tmp_path)
    score(adapted(2), tmp_path)
    assert len(passes) == 1
    score(adapted(4), tmp_path)
    assert len(passes) == 2
    with torch.autocast("cpu", torch.bfloat16):
        score(adapted(4), tmp_path)
    assert len(passes) == 3


@pytest.mark.parametrize(
    "switch",
    [
        lambda model: model.set_adapter("other"),
        lambda model: model.base_model.disable_adapter_layers(),
        lambda model: model.merge_adapter(),
    ],
)
def test_adapters_switched_without_a_change_of_weights_miss(
    switch: Callable[[Any], None], tmp_path: Path, passes: list[int]
) -> None:
    settings = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    torch.manual_seed(0)
    model = get_peft_model(tiny_llama(), settings)
    model.add_adapter("other", settings)
    before = score(model, tmp_path)
    weights = copy.deepcopy(model.state_dict())
    switch(model)
    model.load_state_dict(weights)
    after = score(model, tmp_path)
    assert len(passes) == 2
    assert not torch.equal(torch.stack(before), torch.stack(after))


def test_a_folder_that_cannot_be_made_costs_only_what_is_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    logps = score(tiny_llama(), tmp_path / "file" / "cache")
    assert torch.equal(torch.stack(logps), torch.stack(score_pairs(tiny_llama(), PAIRS)))
    assert "are not kept" in capsys.readouterr().err


def test_a_cut_entry_is_made_again(
    tmp_path: Path, passes: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    fresh = score(tiny_llama(), tmp_path)
    (entry,) = tmp_path.iterdir()
    entry.write_bytes(entry.read_bytes()[:40])
    assert torch.equal(torch.stack(score(tiny_llama(), tmp_path)), torch.stack(fresh))
    assert len(passes) == 2
    assert "scored again" in capsys.readouterr().err
    score(tiny_llama(), tmp_path)
    assert len(passes) == 2


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES])
def test_a_disk_that_takes_no_entry_costs_only_what_is_kept(
    number: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def refused(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(reference_cache, "save_file", refused)
    logps = score(tiny_llama(), tmp_path)
    assert torch.equal(torch.stack(logps), torch.stack(score_pairs(tiny_llama(), PAIRS)))
    assert "are not kept" in capsys.readouterr().err
