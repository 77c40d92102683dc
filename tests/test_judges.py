from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    GPT2Config,
    GPT2ForSequenceClassification,
    LlamaForSequenceClassification,
)

from tests.models.tiny import EOS, PAD, tiny_reward_model, tiny_tokenizer
from tpmm_pl.judges import RewardEnsembleJudge, RewardModelJudge, uncertainty_penalised
from tpmm_pl.types import Completion, InputError, Judge, Prompt

TEMPLATE = "{% for m in messages %}{{ '<' + m['role'] + '> ' + m['content'] + ' ' }}{% endfor %}"

SIZES: dict[str, Any] = {"vocab_size": 32, "num_labels": 1, "bos_token_id": None}


def save_llama(folder: Path, *, pad_id: int | None = PAD, **tokenizer: Any) -> Path:
    return save(tiny_reward_model(pad_id=pad_id), folder, **tokenizer)


def save_gpt2(folder: Path, **tokenizer: Any) -> Path:
    torch.manual_seed(0)
    config = GPT2Config(
        n_embd=16, n_layer=2, n_head=2, n_positions=64, pad_token_id=PAD, eos_token_id=EOS, **SIZES
    )
    return save(GPT2ForSequenceClassification(config), folder, **tokenizer)


def save(model: Any, folder: Path, *, template: str | None = None, **settings: Any) -> Path:
    for parameter in model.parameters():
        parameter.data *= 5
    tokenizer = tiny_tokenizer(template=False)
    tokenizer.chat_template = template
    for name, value in settings.items():
        tokenizer.init_kwargs[name] = value
        setattr(tokenizer, name, value)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def completion(text: str, *, conversation: bool = False) -> Completion:
    messages = ({"role": "user", "content": "w1 w2"},) if conversation else None
    prompt = Prompt("p", "w1 w2 ", (7, 8), messages)
    return Completion(prompt, 0, (9,), text, True, 0.0)


COMPLETIONS = [completion(" ".join(["w3", "w4", "w5", "w9"] * n + ["w6"])) for n in (4, 1, 7, 2, 3)]


@torch.no_grad()
def score(folder: Path, ids: list[int]) -> float:
    """The model's own score of a row alone, without padding."""
    model = LlamaForSequenceClassification.from_pretrained(folder).eval()
    return float(model(torch.tensor([ids])).logits)


@pytest.mark.parametrize("make", [save_llama, save_gpt2])
@pytest.mark.parametrize("side", ["right", "left"])
def test_order_and_token_budget_do_not_change_scores(make: Any, side: str, tmp_path: Path) -> None:
    folder = str(make(tmp_path / "judge", padding_side=side))
    judge: Judge = RewardModelJudge(folder, token_budget=1, device="cpu")
    alone = judge(COMPLETIONS)
    assert len({round(value, 3) for value in alone}) == len(COMPLETIONS)
    together = RewardModelJudge(folder, token_budget=512, device="cpu")
    assert together(COMPLETIONS) == pytest.approx(alone, abs=1e-4)
    assert together(COMPLETIONS[::-1]) == pytest.approx(alone[::-1], abs=1e-4)


@pytest.mark.parametrize("pad", ["<eos>", "<unk>"])
def test_rows_are_padded_with_what_the_model_takes_for_padding(pad: str, tmp_path: Path) -> None:
    # the model looks for the last token that is not <pad>, and the tokenizer pads otherwise
    folder = save_llama(tmp_path / "judge", pad_token=pad)
    alone = RewardModelJudge(str(folder), token_budget=1, device="cpu")(COMPLETIONS)
    together = RewardModelJudge(str(folder), token_budget=512, device="cpu")(COMPLETIONS)
    assert together == pytest.approx(alone, abs=1e-4)


def test_a_model_without_a_padding_token_takes_the_tokenizers(tmp_path: Path) -> None:
    folder = str(save_llama(tmp_path / "judge", pad_id=None))
    alone = RewardModelJudge(folder, token_budget=1, device="cpu")(COMPLETIONS)
    together = RewardModelJudge(folder, token_budget=512, device="cpu")(COMPLETIONS)
    assert together == pytest.approx(alone, abs=1e-4)


@pytest.mark.parametrize("pad_id", [EOS, PAD])
@pytest.mark.parametrize("token", ["<eos>", "<pad>"])
def test_scores_are_those_of_the_models_own_forward_also_where_the_end_pads(
    pad_id: int, token: str, tmp_path: Path
) -> None:
    folder = save_llama(tmp_path / "judge", pad_id=pad_id, pad_token=token)
    answers = [completion(text) for text in ("w3", "w3 w4", "w3 <eos>", "w5 <eos> w6", "<eos>")]
    answers += [replace(completion("w3 w4 <pad>"), finished=False)]
    found = RewardModelJudge(str(folder), device="cpu")(answers)
    # w1 w2, the answer, and its end where it came to one
    rows = [[9, 1], [9, 10, 1], [9, 1], [11, 1, 12, 1], [1], [9, 10, 0]]
    expected = [score(folder, [7, 8, *row]) for row in rows]
    assert found == pytest.approx(expected, abs=1e-6, rel=1e-6)
    before_the_end = score(folder, [7, 8, 9])
    assert (before_the_end == pytest.approx(expected[0], rel=1e-4)) == (pad_id == EOS)


def test_a_conversation_is_read_through_the_judges_own_template(tmp_path: Path) -> None:
    folder = save_llama(tmp_path / "judge", template=TEMPLATE)
    (found,) = RewardModelJudge(str(folder), device="cpu")([completion("w3", conversation=True)])
    # <user> w1 w2 <assistant> w3
    assert found == pytest.approx(score(folder, [3, 7, 8, 4, 9]), abs=1e-5)


@pytest.mark.parametrize("conversation", [True, False])
def test_without_a_template_the_texts_are_joined_and_ended(
    conversation: bool, tmp_path: Path
) -> None:
    folder = save_llama(tmp_path / "judge")
    answer = completion("w3", conversation=conversation)
    (found,) = RewardModelJudge(str(folder), device="cpu")([answer])
    assert found == pytest.approx(score(folder, [7, 8, 9, EOS]), abs=1e-5)


def test_an_answer_that_was_cut_off_does_not_end(tmp_path: Path) -> None:
    folder = save_llama(tmp_path / "judge")
    answer = replace(completion("w3"), finished=False)
    (found,) = RewardModelJudge(str(folder), device="cpu")([answer])
    assert found == pytest.approx(score(folder, [7, 8, 9]), abs=1e-5)


def test_of_a_long_text_the_end_is_kept(tmp_path: Path) -> None:
    folder = save_llama(tmp_path / "judge")
    judge = RewardModelJudge(str(folder), max_length=3, device="cpu")
    (found,) = judge([completion("w3 w4 w5")])
    assert found == pytest.approx(score(folder, [10, 11, EOS]), abs=1e-5)


def test_no_completions_have_no_scores(tmp_path: Path) -> None:
    assert RewardModelJudge(str(save_llama(tmp_path / "judge")), device="cpu")([]) == []


def test_a_judge_is_loaded_when_it_first_scores(tmp_path: Path) -> None:
    judge = RewardModelJudge(str(tmp_path / "judge"), device="cpu")
    save_llama(tmp_path / "judge")
    assert len(judge(COMPLETIONS)) == len(COMPLETIONS)


@pytest.fixture
def members(tmp_path: Path) -> list[str]:
    """Three reward models that differ in their heads."""
    folders = []
    for number in range(3):
        model = tiny_reward_model()
        model.score.weight.data += number * torch.randn(
            model.score.weight.shape, generator=torch.Generator().manual_seed(number)
        )
        folders.append(str(save(model, tmp_path / f"member_{number}")))
    return folders


@pytest.mark.parametrize(("combine", "by_hand"), [("mean", torch.mean), ("worst", torch.amin)])
def test_an_ensemble_combines_its_members(combine: str, by_hand: Any, members: list[str]) -> None:
    apart = torch.tensor([RewardModelJudge(name, device="cpu")(COMPLETIONS) for name in members])
    together = RewardEnsembleJudge(members, combine, device="cpu")(COMPLETIONS)
    assert together == pytest.approx(by_hand(apart, dim=0).tolist(), abs=1e-6)


def test_uncertainty_costs_the_variance_over_members() -> None:
    # means 2 and 4, variances 1 and 0
    scores = torch.tensor([[1.0, 4.0], [3.0, 4.0]])
    assert uncertainty_penalised(scores, 0.5).tolist() == [1.5, 4.0]
    assert uncertainty_penalised(scores, 0.0).tolist() == scores.mean(0).tolist()


def test_averaged_weights_of_heads_are_averaged_scores(members: list[str]) -> None:
    # the members differ in a linear head only, where both averages agree
    weights = RewardEnsembleJudge(members, "weights", device="cpu")(COMPLETIONS)
    assert weights == pytest.approx(
        RewardEnsembleJudge(members, "mean", device="cpu")(COMPLETIONS), rel=1e-6
    )


def test_members_of_two_shapes_cannot_be_averaged(members: list[str], tmp_path: Path) -> None:
    other = str(save_gpt2(tmp_path / "other"))
    judge = RewardEnsembleJudge([members[0], other], "weights", device="cpu")
    with pytest.raises(InputError, match="cannot be averaged"):
        judge(COMPLETIONS)


def test_an_ensemble_of_one_is_refused(members: list[str]) -> None:
    with pytest.raises(InputError, match="two members or more"):
        RewardEnsembleJudge(members[:1])


def test_unknown_combinations_are_refused(members: list[str]) -> None:
    with pytest.raises(InputError, match="unknown combination 'means'; did you mean mean"):
        RewardEnsembleJudge(members, "means")


def test_scores_that_are_no_numbers_are_refused(tmp_path: Path) -> None:
    model = tiny_reward_model()
    model.score.weight.data[0, 0] = torch.nan
    folder = str(save(model, tmp_path / "judge"))
    with pytest.raises(InputError, match="scores that are not finite"):
        RewardModelJudge(folder, device="cpu")(COMPLETIONS)
