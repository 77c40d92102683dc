from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from tests.models.tiny import tiny_llama
from tpmm_pl.data.table import as_table
from tpmm_pl.models import reference_cache
from tpmm_pl.models.reference_cache import cached_logps
from tpmm_pl.models.scoring import score_pairs
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
        return score_pairs(*args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(reference_cache, "score_pairs", counting)
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
