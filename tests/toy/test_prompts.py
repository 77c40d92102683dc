from __future__ import annotations

import pytest

from tpmm_pl.toy.letters import OPERATIONS
from tpmm_pl.toy.prompts import eval_prompts, fuse_prompts, round_prompts
from tpmm_pl.toy.tokenizer import letters_tokenizer
from tpmm_pl.types import Prompt

TOKENIZER = letters_tokenizer()


def _texts(prompts: list[Prompt]) -> set[str]:
    return {prompt.text for prompt in prompts}


def test_prompts_are_numbered_unique_and_end_with_sep() -> None:
    prompts = round_prompts(0, 3, 192, TOKENIZER)
    assert prompts[17].prompt_id == "round-003-0017"
    assert len(_texts(prompts)) == len({prompt.prompt_id for prompt in prompts}) == 192
    for prompt in prompts:
        assert prompt.ids[0] == 3 + list(OPERATIONS).index(prompt.text.split()[0])
        assert prompt.ids[-1] == 2
        assert TOKENIZER.decode(list(prompt.ids)) == prompt.text


def test_every_use_names_its_prompts() -> None:
    assert fuse_prompts(0, 12, 1, TOKENIZER)[0].prompt_id == "fuse-012-0000"
    name = eval_prompts("out_of_domain", 0, 1, TOKENIZER)[0].prompt_id
    assert name == "eval-out_of_domain-0000"


def test_prompts_are_a_function_of_the_arguments() -> None:
    assert round_prompts(1, 2, 20, TOKENIZER) == round_prompts(1, 2, 20, TOKENIZER)
    assert round_prompts(1, 2, 20, TOKENIZER)[:5] == round_prompts(1, 2, 5, TOKENIZER)
    assert eval_prompts("in_domain", 5, 9, TOKENIZER) == eval_prompts("in_domain", 5, 9, TOKENIZER)


@pytest.mark.parametrize(("seed", "round_index"), [(0, 1), (1, 0)])
def test_seeds_and_rounds_bring_fresh_prompts(seed: int, round_index: int) -> None:
    for prompts in (round_prompts, fuse_prompts):
        first, other = prompts(0, 0, 50, TOKENIZER), prompts(seed, round_index, 50, TOKENIZER)
        assert len(_texts(first) & _texts(other)) < 5


def test_no_use_shares_a_prompt_with_another_whatever_the_seeds() -> None:
    runs = [(seed, round_index) for seed in (0, 1) for round_index in range(4)]
    uses = [
        [one for run in runs for one in round_prompts(*run, 300, TOKENIZER)],
        [one for run in runs for one in fuse_prompts(*run, 300, TOKENIZER)],
        [one for seed in (0, 1) for one in eval_prompts("in_domain", seed, 500, TOKENIZER)],
        [one for seed in (0, 1) for one in eval_prompts("out_of_domain", seed, 500, TOKENIZER)],
    ]
    texts = [_texts(prompts) for prompts in uses]
    assert len(set.union(*texts)) == sum(len(some) for some in texts)
