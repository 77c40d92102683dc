from __future__ import annotations

from dataclasses import replace
from math import nan
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from tpmm_pl.data.table import MESSAGES, PairTable, arrow, as_table, join
from tpmm_pl.data.table import with_reference as scored
from tpmm_pl.types import Pair, PairLogps


def pair(index: int, **changes: object) -> Pair:
    whole = Pair(
        prompt_id=f"p{index}",
        prompt=f"prompt {index}",
        chosen="good",
        rejected="bad",
        prompt_ids=(index,) * (index % 3),
        chosen_ids=(7, index),
        rejected_ids=(8,),
        score_chosen=index + 0.5,
        score_rejected=-float(index),
        ref_chosen_logps=-1.0,
        ref_rejected_logps=-2.0,
        margin=0.25,
    )
    return replace(whole, **changes)  # type: ignore[arg-type]


PAIRS = [pair(index) for index in range(10)]


def on_disk(path: Path, pairs: list[Pair], chunk: int = 3) -> PairTable:
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, arrow([]).schema) as writer:
        for start in range(0, len(pairs), chunk):
            writer.write_table(arrow(pairs[start : start + chunk]))
    return PairTable.of(pa.ipc.open_file(pa.memory_map(str(path))).read_all())


def test_a_table_is_a_sequence_of_its_pairs(tmp_path: Path) -> None:
    table = on_disk(tmp_path / "t.arrow", PAIRS)
    assert list(table) == PAIRS
    assert table == PAIRS
    assert table != PAIRS[:-1]
    assert table != "pairs"
    assert (len(table), table[4], table[-1]) == (10, PAIRS[4], PAIRS[9])
    assert list(table[2:9:3]) == PAIRS[2:9:3]
    assert list(table.select([9, 0, 9])) == [PAIRS[9], PAIRS[0], PAIRS[9]]
    with pytest.raises(IndexError):
        table[10]


def test_the_names_of_some_prompts_are_read_without_those_of_all() -> None:
    class OneByOne:
        def __init__(self, cells: Any) -> None:
            self.cells = cells

        def column(self, name: str) -> OneByOne:
            return OneByOne(self.cells.column(name))

        def __getitem__(self, row: int) -> Any:
            return self.cells[row]

    table = as_table(PAIRS)
    some = replace(table, columns=OneByOne(table.columns)).select([7, 2])
    assert some.column("prompt_id").tolist() == ["p7", "p2"]


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(0, 9)), st.lists(st.integers(0, 9)), st.data())
def test_views_of_views_are_what_lists_would_give(
    first: list[int], second: list[int], data: st.DataObject
) -> None:
    table, known = join(as_table(PAIRS).select(first), PAIRS), [PAIRS[i] for i in first] + PAIRS
    chosen = data.draw(st.lists(st.integers(0, len(known) - 1)))
    assert list(table.select(chosen)) == [known[i] for i in chosen]
    swapped = set(second)
    expected = [_flipped(one) if i in swapped else one for i, one in enumerate(known)]
    assert list(table.flipped(second)) == expected
    assert list(table.flipped(second).select(chosen)) == [expected[i] for i in chosen]


def _flipped(one: Pair) -> Pair:
    return replace(
        one,
        chosen=one.rejected,
        rejected=one.chosen,
        chosen_ids=one.rejected_ids,
        rejected_ids=one.chosen_ids,
        score_chosen=one.score_rejected,
        score_rejected=one.score_chosen,
        ref_chosen_logps=one.ref_rejected_logps,
        ref_rejected_logps=one.ref_chosen_logps,
        flipped=not one.flipped,
    )


def test_two_swaps_undo_each_other() -> None:
    table = as_table(PAIRS)
    once = table.flipped([3, 4])
    assert [one.flipped for one in once] == [index in (3, 4) for index in range(10)]
    assert once.flipped([4]) == table.flipped([3])
    assert table == PAIRS, "the table itself is as it was"


def test_columns_and_lengths_follow_views_and_swaps(tmp_path: Path) -> None:
    table = on_disk(tmp_path / "t.arrow", PAIRS).select([4, 2]).flipped([0])
    assert table.column("prompt_id").tolist() == ["p4", "p2"]
    assert table.column("score_chosen").tolist() == [-4.0, 2.5]
    assert table.column("flipped").tolist() == [True, False]
    lengths = {name: values.tolist() for name, values in table.lengths().items()}
    assert lengths == {"prompt_ids": [1, 2], "chosen_ids": [1, 2], "rejected_ids": [2, 1]}


def test_parts_are_joined_in_order_whatever_they_are(tmp_path: Path) -> None:
    table = on_disk(tmp_path / "t.arrow", PAIRS)
    joined = join(table[7:], [], [pair(20), pair(21)], table.select([2]).flipped([0]))
    assert list(joined) == [*PAIRS[7:], pair(20), pair(21), _flipped(PAIRS[2])]
    assert list(join()) == []


@pytest.mark.parametrize("pairs", [PAIRS, as_table(PAIRS)], ids=["list", "table"])
def test_reference_log_probabilities_become_columns(pairs: list[Pair] | PairTable) -> None:
    logps = PairLogps(torch.arange(10) / 3, -torch.arange(10) / 7)
    found = scored(pairs, logps)
    assert [one.ref_chosen_logps for one in found] == logps.chosen.tolist()
    assert [one.ref_rejected_logps for one in found] == logps.rejected.tolist()
    assert [replace(p, ref_chosen_logps=-1.0, ref_rejected_logps=-2.0) for p in found] == PAIRS


def test_distinct_prompts_come_in_order_with_their_conversations() -> None:
    twice = [pair(2), pair(1), pair(2, chosen="better")]
    messages = ['[{"role": "user", "content": "q"}]', None, None]
    columns = arrow(twice).append_column(MESSAGES, pa.array(messages, type=MESSAGES.type))
    first, second = PairTable.of(columns).prompts()
    assert (first.prompt_id, first.text, first.ids) == ("p2", "prompt 2", (2, 2))
    assert first.messages == ({"role": "user", "content": "q"},)
    assert (second.prompt_id, second.messages) == ("p1", None)


def test_a_view_copies_no_text_and_no_token() -> None:
    long = as_table([pair(0, prompt="x" * 100_000, weight=nan)])
    before = pa.total_allocated_bytes()
    view = long.select(np.zeros(1000, dtype=np.int64)).flipped([5])
    together = join(view, view)
    assert pa.total_allocated_bytes() == before
    assert len(together) == 2000


def test_a_view_is_written_as_its_pairs(tmp_path: Path) -> None:
    whole = on_disk(tmp_path / "t.arrow", PAIRS)
    table = join(whole.select([7, 1, 1, 4]), PAIRS[:2]).flipped([0, 2]).flipped([2, 4])
    assert len(set(table.swapped)) == 2
    assert arrow(table).equals(arrow(list(table)))
    assert arrow(table[:0]).equals(arrow([]))


def test_conversations_go_along_when_a_table_is_written() -> None:
    table = as_table(PAIRS[:3], {"prompt 1": "[1]"})
    assert table.arrow().column(MESSAGES.name).to_pylist() == [None, "[1]", None]
    swapped = table.select([1, 0]).flipped([0])
    assert swapped.arrow().column(MESSAGES.name).to_pylist() == ["[1]", None]


def test_tokens_of_a_table_are_those_of_its_pairs(tmp_path: Path) -> None:
    table = on_disk(tmp_path / "t.arrow", PAIRS).select([5, 3, 3, 9]).flipped([1, 3])
    expected = [(pair.prompt_ids, pair.chosen_ids) for pair in table]
    expected += [(pair.prompt_ids, pair.rejected_ids) for pair in table]
    rows = table.token_rows()
    assert [(tuple(a.tolist()), tuple(b.tolist())) for a, b in rows] == expected


def test_a_loader_is_given_its_batches_as_views() -> None:
    table = as_table(PAIRS)
    batches = list(DataLoader(table, batch_sampler=[[3, 1], [9]], collate_fn=lambda some: some))  # type: ignore[arg-type]
    assert all(isinstance(batch, PairTable) for batch in batches)
    assert batches == [[PAIRS[3], PAIRS[1]], [PAIRS[9]]]
