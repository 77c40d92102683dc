from __future__ import annotations

import json
from math import isnan
from pathlib import Path
from typing import Any

import pytest

from tpmm_pl.data.rows.formats import (
    RawPair,
    RawPrompt,
    preferences,
    prompts,
    to_preference,
)
from tpmm_pl.data.rows.report import DataReport
from tpmm_pl.data.rows.sources import DataSource
from tpmm_pl.types import InputError

REAL = Path(__file__).parents[4] / "shared" / "data" / "alpaca_eval_pairs"


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


PLAIN = {"prompt": "2 + 2 = ", "chosen": "4", "rejected": "5"}
CHAT = {"prompt": [user("hi")], "chosen": [assistant("hello")], "rejected": [assistant("no")]}


def write(path: Path, *lines: object) -> Path:
    path.write_text("\n".join(x if isinstance(x, str) else json.dumps(x) for x in lines))
    return path


def report_of(path: Path, **settings: Any) -> tuple[list[RawPair], DataReport]:
    report = DataReport(max_bad_rows=settings.pop("max_bad_rows", 0))
    return list(preferences(DataSource(str(path), **settings), report)), report


def prompts_of(path: Path) -> list[RawPrompt]:
    return list(prompts(DataSource(str(path)), DataReport()))


@pytest.mark.parametrize("name", ["prompt_ids", "prompt_input_ids"])
def test_token_ids_are_taken_as_they_are(tmp_path: Path, name: str) -> None:
    ids = {name.replace("prompt", field): [n, 0] for n, field in enumerate(("prompt", "chosen"))}
    row = {**ids, name.replace("prompt", "rejected"): [7], "chosen": "ignored", "margin": 2}
    [pair], _ = report_of(write(tmp_path / "d.jsonl", row))
    assert pair.ids == ((0, 0), (1, 0), (7,))
    assert (pair.prompt, pair.chosen, pair.rejected, pair.margin) == ("", "", "", 2.0)


def test_the_columns_beside_the_texts_are_kept(tmp_path: Path) -> None:
    tool = {"type": "function", "function": {"name": "add"}}
    row = {
        **CHAT,
        "system": "be kind",
        "tools": [tool],
        "margin": 1,
        "weight": 0.5,
        "score_chosen": 3,
        "score_rejected": 2,
        "ref_chosen_logps": -1.5,
        "ref_rejected_logps": -2.5,
    }
    [pair], _ = report_of(write(tmp_path / "d.jsonl", row))
    assert pair == RawPair(
        ({"role": "system", "content": "be kind"}, user("hi")),
        "",
        (assistant("hello"),),
        (assistant("no"),),
        3.0,
        2.0,
        1.0,
        0.5,
        -1.5,
        -2.5,
        None,
        tools=(tool,),
    )
    [prompt] = prompts_of(tmp_path / "d.jsonl")
    assert (prompt.prompt, prompt.tools) == (pair.prompt, (tool,))


def test_plain_texts_are_taken_as_they_are() -> None:
    pair = to_preference({**PLAIN, "score_chosen": 2, "source": "x"}, "here")
    assert (pair.prompt, pair.chosen, pair.rejected) == ("2 + 2 = ", "4", "5")
    assert pair.score_chosen == 2.0
    assert isnan(pair.score_rejected)
    assert pair.where == "here"


def test_conversations_keep_role_and_content() -> None:
    row = {**CHAT, "prompt": [{**user("hi"), "id": 7}]}
    pair = to_preference(row, "here")
    assert pair.prompt == (user("hi"),)
    assert pair.chosen == (assistant("hello"),)


@pytest.mark.parametrize("prompt", [{}, {"prompt": None}, {"prompt": "hi"}])
def test_turns_that_both_answers_begin_with_are_the_prompt(prompt: dict[str, Any]) -> None:
    shared = [user("hi"), assistant("yes?"), user("2 + 2?")]
    row = {**prompt, "chosen": [*shared, assistant("4")], "rejected": [*shared, assistant("5")]}
    pair = to_preference(row, "here")
    assert pair.prompt == tuple(shared)
    assert pair.chosen == (assistant("4"),)
    assert pair.rejected == (assistant("5"),)


BAD: list[tuple[dict[str, Any], str]] = [
    ({**PLAIN, "chosen": None}, r"no field 'chosen', only \['chosen', 'prompt', .*; a line is"),
    ({"chosen": "a", "rejected": "b"}, r"no prompt, and chosen and rejected do not begin with"),
    ({**CHAT, "prompt": None, "chosen": "a"}, r"do not match \(prompt missing, chosen a text, rej"),
    ({**PLAIN, "system": "s"}, r"plain text has no system turn, but there is a column 'system'"),
    ({**PLAIN, "margin": float("nan")}, r"margin is nan; give a finite number"),
    ({**PLAIN, "weight": -1}, r"weight is -1; give a finite number above 0"),
    ({**PLAIN, "ref_chosen_logps": 0}, r"ref_chosen_logps is 0 and ref_rejected_logps is None"),
    ({"chosen_ids": [1], "rejected_ids": [2]}, r"no column 'prompt_ids', only \['chosen_ids', 're"),
    ({"prompt_ids": [0], "chosen_ids": [-1], "rejected_ids": [2]}, r"chosen_ids\[0\] is -1; give"),
    (
        {"prompt": "p", "responses": ["a"], "scores": 1},
        r"1 responses, but scores is a number; give",
    ),
    ({**PLAIN, "rejected": " "}, r"rejected is empty; fill it or delete the row"),
    ({**PLAIN, "prompt": 3}, r"prompt is a number; a line is"),
    ({**PLAIN, "chosen": CHAT["chosen"]}, r"do not match \(prompt a text, chosen messages, rej"),
    ({**CHAT, "chosen": "hello"}, r"do not match \(prompt messages, chosen a text"),
    ({**CHAT, "chosen": []}, r"chosen is empty"),
    ({**CHAT, "chosen": ["hello"]}, r"chosen\[0\] is a text; a turn has 'role' and 'content'"),
    ({**CHAT, "chosen": [{"role": "assistant"}]}, r"chosen\[0\]: content is missing; it must"),
    ({**CHAT, "chosen": [assistant("")]}, r"chosen\[0\]: content is empty; fill it or delete"),
    ({**CHAT, "chosen": [user("x")]}, r"chosen begins with the role 'user', not 'assistant', and "),
    (
        {**CHAT, "chosen": [user("other"), assistant("x")]},
        r"chosen begins with the role 'user', .* and not with the turns of prompt; put the turns",
    ),
    (
        {**CHAT, "chosen": [assistant("x"), user("y")]},
        r"chosen ends with the role 'user', not 'assistant'; end it with the answer",
    ),
    ({**CHAT, "prompt": [assistant("x")]}, r"prompt ends with the assistant; end it with the"),
    ({"chosen": CHAT["chosen"], "rejected": CHAT["rejected"]}, r"do not begin with the same turns"),
]


@pytest.mark.parametrize(("row", "sentence"), BAD, ids=[sentence for _, sentence in BAD])
def test_a_bad_row_is_named_with_file_line_and_field(
    tmp_path: Path, row: dict[str, Any], sentence: str
) -> None:
    path = write(tmp_path / "d.jsonl", PLAIN, "", row)
    with pytest.raises(InputError, match=r"d\.jsonl, line 3: .*" + sentence):
        report_of(path)


def test_a_bad_turn_names_the_line_too(tmp_path: Path) -> None:
    path = write(tmp_path / "d.jsonl", {**CHAT, "chosen": [{"role": "assistant", "content": 1}]})
    with pytest.raises(InputError, match=r"line 1: chosen\[0\]: content is a number; it must be a"):
        report_of(path)


def test_identical_answers_are_dropped_and_counted(tmp_path: Path) -> None:
    turns = [user("hi"), assistant("same")]
    same = [{**PLAIN, "rejected": "4"}, {"chosen": turns, "rejected": turns}]
    path = write(tmp_path / "d.jsonl", *same, PLAIN, CHAT)
    pairs, report = report_of(path)
    assert [pair.where[-6:] for pair in pairs] == ["line 3", "line 4"]
    assert report.dropped(str(path)) == {"chosen and rejected identical": 2}


def test_a_file_without_a_usable_pair_is_refused(tmp_path: Path) -> None:
    same = {**PLAIN, "rejected": "4"}
    with pytest.raises(
        InputError, match=r"holds no usable pair \(dropped: 1 chosen and .*\); a line"
    ):
        report_of(write(tmp_path / "d.jsonl", same))
    with pytest.raises(InputError, match=r"holds no usable pair \(dropped: none\); a line is"):
        report_of(write(tmp_path / "e.jsonl", ""))


def test_every_row_read_is_kept_dropped_or_bad(tmp_path: Path) -> None:
    ranking = {"prompt": "p", "responses": ["a", "b", "c", "a"], "scores": [4, 3, 3, 1]}
    lonely = {"prompt": "p", "responses": ["a"], "scores": [1]}
    rows = [PLAIN, "{", {**PLAIN, "rejected": "4"}, ranking, lonely, {"prompt": 1}]
    path = write(tmp_path / "d.jsonl", *rows)
    pairs, report = report_of(path, pairing="all", max_bad_rows=2)
    counts = report.sources[str(path)]
    assert counts.dropped == {
        "chosen and rejected identical": 2,
        "answers with equal scores": 1,
        "rankings of fewer than two answers": 1,
    }
    assert [sentence.partition(":")[0][-6:] for sentence in counts.bad] == ["line 2", "line 6"]
    # 5 rows that are one pair or none each, and a ranking of 6 pairs
    assert counts.read == len(pairs) + counts.dropped.total() + len(counts.bad) == 5 + 6
    with pytest.raises(InputError, match=r"line 6: no field 'chosen', .* bad row 2: raise --data"):
        report_of(path, max_bad_rows=1)


def test_pairs_of_the_same_tokens_are_dropped(tmp_path: Path) -> None:
    same = {"prompt_ids": [1], "chosen_ids": [2], "rejected_ids": [2]}
    pairs, report = report_of(write(tmp_path / "d.jsonl", same, {**same, "rejected_ids": [3]}))
    assert [pair.ids for pair in pairs] == [((1,), (2,), (3,))]
    assert report.dropped(str(tmp_path / "d.jsonl")) == {"chosen and rejected identical": 1}


def test_a_field_nested_too_deeply_is_named(tmp_path: Path) -> None:
    depth = 800
    row = json.dumps({**CHAT, "tools": [{}]}).replace("{}", '{"a":' * depth + "1" + "}" * depth)
    with pytest.raises(InputError, match=r"line 1: a field is nested too deeply; delete the row"):
        report_of(write(tmp_path / "d.jsonl", row))
    with pytest.raises(InputError, match=r"line 1: a field is nested too deeply; delete the row"):
        prompts_of(tmp_path / "d.jsonl")


def test_pairs_are_read_as_they_are_asked_for(tmp_path: Path) -> None:
    path = write(tmp_path / "d.jsonl", PLAIN, "{")
    pairs = preferences(DataSource(str(path)), DataReport())
    assert next(pairs).prompt == PLAIN["prompt"]
    with pytest.raises(InputError, match=r"line 2: not JSON"):
        next(pairs)


def test_prompts_are_texts_or_messages_without_their_answers(tmp_path: Path) -> None:
    turns = [user("a"), assistant("b")]
    rows = [
        {"prompt": "text"},
        {"prompt": [user("a")]},
        {"messages": [user("b"), assistant("c"), user("d"), assistant("e")]},
        CHAT,
        {"chosen": [user("a"), assistant("b")], "rejected": [user("a"), assistant("c")]},
        {"prompt": "named", "chosen": [user("x"), *turns], "rejected": [user("x"), *turns]},
        {"chosen": "2 + 2 = 4", "rejected": "2 + 2 = 5"},
        {"prompt": "p", "responses": ["a", "b"], "scores": [1, 2], "system": ""},
    ]
    read = prompts_of(write(tmp_path / "p.jsonl", *rows))
    assert [row.prompt for row in read] == [
        "text",
        (user("a"),),
        (user("b"), assistant("c"), user("d")),
        (user("hi"),),
        (user("a"),),
        (user("x"), user("a")),
        "2 + 2 =",
        "p",
    ]
    assert read[2].where.endswith("p.jsonl, line 3")


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        ({"text": "x"}, r"line 1: no field 'prompt', only \['text'\]"),
        ({"messages": "x"}, r"line 1: messages is a text; name a plain text 'prompt'"),
        ({"messages": [assistant("x")]}, r"line 1: nothing is left to answer; add the user's"),
        ({"prompt": [user("x"), assistant("y")]}, r"line 1: prompt ends with the assistant"),
        ("", r"p\.jsonl holds no prompt; a line is"),
    ],
)
def test_a_bad_prompt_is_named(tmp_path: Path, row: object, sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        prompts_of(write(tmp_path / "p.jsonl", row))


@pytest.mark.skipif(not REAL.is_dir(), reason="no real pairs beside the repository")
def test_real_pairs_are_read() -> None:
    path = REAL / "eval_in_domain.jsonl"
    pairs, report = report_of(path)
    assert len(pairs) + report.dropped(str(path)).total() == 533
    assert all(isinstance(pair, RawPair) and isinstance(pair.prompt, tuple) for pair in pairs)


def test_a_margin_is_read_and_is_0_where_there_is_none() -> None:
    assert to_preference(PLAIN, "here").margin == 0.0
    assert to_preference({**PLAIN, "margin": 2}, "here").margin == 2.0
    assert to_preference({**CHAT, "margin": -0.5}, "here").margin == -0.5


@pytest.mark.parametrize("value", ["1", True, float("nan"), float("inf"), [1]])
def test_a_margin_that_is_no_finite_number_is_named(value: object) -> None:
    with pytest.raises(InputError, match=r"d\.jsonl, line 3: margin is .+; give a finite number"):
        to_preference({**PLAIN, "margin": value}, "d.jsonl, line 3")
