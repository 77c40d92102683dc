"""Random conversations: no text, no row and no label is lost; TRL's processing as the oracle."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.data.tokens.byte_level import EOS, EOS_ID, TEMPLATES, byte_tokenizer, decoded
from tpmm_pl.data.batching import collate
from tpmm_pl.data.packing import pad_tree
from tpmm_pl.data.rows.formats import RawPair
from tpmm_pl.data.tokens.chat import tokenize_pairs
from tpmm_pl.data.tokens.encoding import encode
from tpmm_pl.types import Pair

Turn = dict[str, str]

# pieces that merge with their neighbours, over borders too, or read like the template's own
PIECES = st.sampled_from(["\n", "\n\n", " ", "  ", " the", "hell", "<start>", "<start>user\n", "é"])
CONTENT = st.lists(PIECES | st.text(max_size=8), min_size=1, max_size=5).map("".join)
SAID = CONTENT.filter(lambda text: bool(text.strip()) and EOS not in text)


@st.composite
def pairs_of_turns(draw: st.DrawFn) -> RawPair:
    turns = [{"role": "system", "content": draw(SAID)}] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(0, 2))):
        turns += [
            {"role": "user", "content": draw(SAID)},
            {"role": "assistant", "content": draw(SAID)},
        ]
    turns.append({"role": "user", "content": draw(SAID)})
    chosen, rejected = (({"role": "assistant", "content": draw(SAID)},) for _ in range(2))
    return RawPair(tuple(turns), "d", chosen, rejected)


PLAIN = st.builds(RawPair, SAID, st.just("d"), SAID, SAID)
ROWS = st.lists(
    (pairs_of_turns() | PLAIN).filter(lambda row: row.chosen != row.rejected),
    min_size=1,
    max_size=6,
)


def chatml(turns: tuple[Turn, ...]) -> str:
    return "".join(f"<start>{turn['role']}\n{turn['content']}<end>\n" for turn in turns)


def written(row: RawPair) -> tuple[str, str, str]:
    """Prompt and completions as ChatML has them, without tokenizer or template."""
    if isinstance(row.prompt, str):
        return row.prompt, str(row.chosen), str(row.rejected)
    chosen, rejected = (turns[0]["content"] for turns in (row.chosen, row.rejected))  # type: ignore[index]
    return f"{chatml(row.prompt)}<start>assistant\n", chosen, rejected  # type: ignore[arg-type]


def labelled(pair: Pair) -> list[list[int]]:
    """The positions of chosen and rejected row that are scored, checked to be their tokens."""
    tree = collate([pair]).tree
    places = tree.positions[tree.states[tree.state_of]] + 1
    rows = pad_tree(tree)[0]
    positions = []
    for number, ids in enumerate(rows):
        found = places[tree.row_of == number]
        assert torch.equal(ids[found], tree.targets[tree.row_of == number])
        positions.append(found.tolist())
    return positions


@settings(deadline=None, max_examples=100)
@given(ROWS, st.integers(1, 60), st.integers(1, 60), st.sampled_from(["keep_end", "keep_start"]))
def test_no_text_label_or_row_is_lost(
    rows: list[RawPair], max_length: int, max_prompt_length: int, truncation: str
) -> None:
    tokenizer = byte_tokenizer()
    numbered = [
        RawPair(row.prompt, "d", row.chosen, row.rejected, margin=float(number))
        for number, row in enumerate(rows)
    ]
    whole, dropped = tokenize_pairs(numbered, tokenizer, max_length=100_000)
    assert len(whole) == len(rows)
    assert not dropped
    for pair in whole:
        prompt, chosen, rejected = written(rows[int(pair.margin)])
        assert (pair.prompt, pair.chosen, pair.rejected) == (prompt, chosen, rejected)
        # as one text: bytes of one character may be tokens on both sides of the border
        assert decoded([*pair.prompt_ids, *pair.chosen_ids]) == prompt + chosen + EOS
        assert decoded([*pair.prompt_ids, *pair.rejected_ids]) == prompt + rejected + EOS
        begin = len(pair.prompt_ids)
        assert labelled(pair) == [
            [*range(begin, begin + len(ids))] for ids in (pair.chosen_ids, pair.rejected_ids)
        ]
        assert decoded(pair.chosen_ids) == chosen + EOS, "the labels are all of the answer"
        assert (pair.chosen_ids.count(EOS_ID), pair.rejected_ids.count(EOS_ID)) == (1, 1)

    cut, counts = tokenize_pairs(
        numbered,
        tokenizer,
        max_length=max_length,
        max_prompt_length=max_prompt_length,
        truncation=truncation,
    )
    kept = {pair.margin: pair for pair in cut}
    assert list(kept) == sorted(kept), "in the rows' order"
    expected = Counter[str]()
    for pair in whole:
        expected.update(
            expectation(pair, kept.get(pair.margin), max_length, max_prompt_length, truncation)
        )
    assert counts == expected


def expectation(
    whole: Pair, kept: Pair | None, max_length: int, max_prompt_length: int, truncation: str
) -> list[str]:
    """Check what is left of a pair; return what must have been counted of it."""
    count = min(len(whole.prompt_ids), max_prompt_length, max_length)
    first = 0 if truncation == "keep_start" else len(whole.prompt_ids) - count
    room = max_length - count
    chosen, rejected = whole.chosen_ids[:room], whole.rejected_ids[:room]
    if room == 0 or chosen == rejected:
        assert kept is None
        same = "chosen and rejected have the same tokens"
        return [f"dropped: {same if room else 'completion empty after truncation'}"]
    assert kept is not None
    assert kept.prompt_ids == whole.prompt_ids[first : first + count]
    assert (kept.chosen_ids, kept.rejected_ids) == (chosen, rejected)
    assert (kept.prompt_id, kept.chosen) == (whole.prompt_id, whole.chosen), "texts stay whole"
    cut = {
        "prompts cut off": count < len(whole.prompt_ids),
        "completions cut off": max(len(whole.chosen_ids), len(whole.rejected_ids)) > room,
    }
    return [reason for reason, is_cut in cut.items() if is_cut]


class Rows(list[dict[str, Any]]):
    """As much of a data set as TRL's trainer asks for; a real one costs 0.1 s an example."""

    def map(self, function: Any, fn_kwargs: dict[str, Any], **_: Any) -> Rows:
        return Rows(function(row, **fn_kwargs) for row in self)


def trls_rows(rows: list[RawPair], tokenizer: Any) -> Rows:
    """What TRL's trainer makes of the rows before it truncates them."""
    trl = pytest.importorskip("trl.trainer.dpo_trainer")
    given = Rows(
        {"prompt": [*row.prompt], "chosen": [*row.chosen], "rejected": [*row.rejected]}
        for row in rows
    )
    trainer, arguments = SimpleNamespace(_tokenizer=tokenizer), SimpleNamespace(max_length=None)
    made = trl.DPOTrainer._prepare_dataset(trainer, given, tokenizer, arguments, "train")
    assert isinstance(made, Rows)
    return made


def said_to(asked: str, chosen: str, rejected: str) -> RawPair:
    turns = [
        {"role": role, "content": text}
        for role, text in (("user", asked), ("assistant", chosen), ("assistant", rejected))
    ]
    return RawPair((turns[0],), "d", (turns[1],), (turns[2],))


@example([said_to("hi", "\n\nspans the border", "does not")], "chatml")
@example([said_to("hi", "ends", "does not")], "no end of a turn")
@settings(deadline=None, max_examples=25)
@given(
    st.lists(pairs_of_turns(), min_size=1, max_size=10),
    st.sampled_from(sorted(TEMPLATES)),
)
def test_the_tokens_are_trls_but_for_two_rules(rows: list[RawPair], template: str) -> None:
    tokenizer = byte_tokenizer(template=TEMPLATES[template])
    ours, dropped = tokenize_pairs(
        [
            RawPair(row.prompt, "d", row.chosen, row.rejected, margin=n)
            for n, row in enumerate(rows)
        ],
        tokenizer,
        max_length=100_000,
    )
    assert len(ours) + dropped.total() == len(rows)
    theirs = trls_rows(rows, tokenizer)
    for pair in ours:
        row = theirs[int(pair.margin)]
        for own, answer in ((pair.chosen_ids, "chosen"), (pair.rejected_ids, "rejected")):
            check_against_trl(pair.prompt_ids, own, row["prompt_ids"], row[answer + "_ids"])


def check_against_trl(
    prompt: tuple[int, ...], own: tuple[int, ...], trls_prompt: list[int], trls_own: list[int]
) -> None:
    tokenizer = byte_tokenizer()
    if EOS_ID in trls_own:
        # rule 1: a completion ends with its turn, TRL's with what the template writes behind it,
        # which no model that stops there ever samples
        end = trls_own.index(EOS_ID) + 1
        assert decoded(trls_own[end:]) in ("", "\n")
        trls_own = trls_own[:end]
    else:
        # rule 1 again: where the template does not end a turn, ours does
        trls_own = [*trls_own, EOS_ID]
    ours, trls = [*prompt, *own], [*trls_prompt, *trls_own]
    if trls[: len(prompt)] == [*prompt]:
        assert ours == trls
    else:
        # rule 2: TRL's prompt ends before a token that spans its border; ours stays what it is
        # when a completion is sampled behind it
        answer = decoded(own[:-1])
        assert encode(decoded(prompt), tokenizer) == prompt
        assert encode(answer, tokenizer) == own[:-1]
        assert decoded(ours) == decoded(trls)
