"""Pairs in Arrow columns: a hundred thousand of them in the memory of their tokens."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from operator import eq
from typing import Any, overload

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from tpmm_pl.types import Pair, PairLogps, Prompt

_TOKENS = pa.list_(pa.int32())

# text and tokens: a text need not re-tokenise to the tokens that were sampled
SCHEMA = pa.schema(
    [
        ("prompt_id", pa.string()),
        ("prompt", pa.string()),
        ("chosen", pa.string()),
        ("rejected", pa.string()),
        ("prompt_ids", _TOKENS),
        ("chosen_ids", _TOKENS),
        ("rejected_ids", _TOKENS),
        ("score_chosen", pa.float64()),
        ("score_rejected", pa.float64()),
        ("flipped", pa.bool_()),
        ("weight", pa.float64()),
        ("ref_chosen_logps", pa.float64()),
        ("ref_rejected_logps", pa.float64()),
        ("margin", pa.float64()),
    ]
)
"""Columns of a pairs file, the fields of :class:`tpmm_pl.types.Pair` in order."""

MESSAGES = pa.field("messages", pa.string())
"""The conversation behind a prompt as JSON, null for a plain text; not of a pair."""

_TEXTS, _LARGE, _NUMBERS = SCHEMA.names[:4], SCHEMA.names[:7], SCHEMA.names[7:]
_SWAPPED = {"chosen": "rejected", "chosen_ids": "rejected_ids"}
_SWAPPED |= {rejected: chosen for chosen, rejected in _SWAPPED.items()}


@dataclass(frozen=True, eq=False)
class PairTable(Sequence[Pair]):
    """Pairs whose texts and tokens stay in Arrow columns, often a memory-mapped file.

    A :class:`Pair` is made when it is asked for. Parts, orders and swapped labels are views: they
    copy the numbers of a pair, 64 bytes, and neither text nor token.

    Args:
        columns: Texts, tokens and ``messages``.
        rows: Which of its rows the pairs are, in order.
        swapped: Whether a pair's completions are exchanged in ``columns``.
        numbers: The other fields by name, one value a pair, not exchanged.
    """

    columns: Any
    rows: NDArray[np.int64]
    swapped: NDArray[np.bool_]
    numbers: Mapping[str, NDArray[Any]]

    @classmethod
    def of(cls, table: Any) -> PairTable:
        """Return the pairs of an Arrow table with the columns of ``SCHEMA``.

        Args:
            table: It may have the column ``messages``; others are left out.
        """
        if MESSAGES.name not in table.column_names:
            table = table.append_column(MESSAGES, pa.nulls(len(table), MESSAGES.type))
        return cls(
            columns=table.select([*_LARGE, MESSAGES.name]),
            rows=np.arange(len(table)),
            swapped=np.zeros(len(table), dtype=bool),
            numbers={name: table.column(name).to_numpy() for name in _NUMBERS},
        )

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, index: int) -> Pair: ...

    @overload
    def __getitem__(self, index: slice) -> PairTable: ...

    def __getitem__(self, index: int | slice) -> Pair | PairTable:
        if isinstance(index, slice):
            return self.select(np.arange(len(self))[index])
        return next(iter(self.select([range(len(self))[index]])))

    def __getitems__(self, indices: Sequence[int]) -> PairTable:
        """Return the pairs of a batch, as a ``DataLoader`` asks for them."""
        return self.select(indices)

    def __iter__(self) -> Iterator[Pair]:
        columns = [self.columns.column(name) for name in _LARGE]
        exchanged = [self.columns.column(_SWAPPED.get(name, name)) for name in _LARGE]
        numbers = zip(*(self.numbers[name].tolist() for name in _NUMBERS), strict=True)
        rows = zip(self.rows.tolist(), self.swapped.tolist(), numbers, strict=True)
        for row, swapped, values in rows:
            cells = [column[row] for column in (exchanged if swapped else columns)]
            texts = [cell.as_py() for cell in cells[: len(_TEXTS)]]
            # by way of numpy: as_py makes a scalar of every token
            ids = [tuple(cell.values.to_numpy().tolist()) for cell in cells[len(_TEXTS) :]]
            yield Pair(*texts, *ids, *values)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence):
            return NotImplemented
        return len(self) == len(other) and all(map(eq, self, other))

    def select(self, indices: Sequence[int] | NDArray[np.int64]) -> PairTable:
        """Return the pairs at ``indices``, in that order; one may come several times."""
        chosen = np.asarray(indices, dtype=np.int64)
        numbers = {name: values[chosen] for name, values in self.numbers.items()}
        return replace(self, rows=self.rows[chosen], swapped=self.swapped[chosen], numbers=numbers)

    def flipped(self, indices: Sequence[int] | NDArray[np.int64]) -> PairTable:
        """Return the pairs with the labels at ``indices`` swapped.

        Completions, scores and reference log-probabilities change sides, the margin stays; two
        swaps undo each other, also in the column ``flipped``.
        """
        flip = np.zeros(len(self), dtype=bool)
        flip[np.asarray(indices, dtype=np.int64)] = True
        numbers = dict(self.numbers)
        for one, other in (
            ("score_chosen", "score_rejected"),
            ("ref_chosen_logps", "ref_rejected_logps"),
        ):
            first, second = numbers[one], numbers[other]
            numbers[one] = np.where(flip, second, first)
            numbers[other] = np.where(flip, first, second)
        numbers["flipped"] = numbers["flipped"] ^ flip
        return replace(self, swapped=self.swapped ^ flip, numbers=numbers)

    def column(self, name: str) -> NDArray[Any]:
        """Return one value a pair: ``prompt_id`` or a number, by the name of the field."""
        if name in self.numbers:
            return self.numbers[name]
        cells = self.columns.column(name)
        # one by one: the few rows of a batch must not cost a pass over all
        return np.array([cells[row].as_py() for row in self.rows.tolist()], dtype=object)

    def lengths(self) -> dict[str, NDArray[np.int64]]:
        """Return the tokens of ``prompt_ids``, ``chosen_ids`` and ``rejected_ids``, one a pair."""
        prompt, left, right = (
            pc.list_value_length(self.columns.column(name)).to_numpy()[self.rows]
            for name in ("prompt_ids", "chosen_ids", "rejected_ids")
        )
        return {
            "prompt_ids": prompt,
            "chosen_ids": np.where(self.swapped, right, left),
            "rejected_ids": np.where(self.swapped, left, right),
        }

    def arrow(self) -> Any:
        """Return the pairs as an Arrow table with the columns of ``SCHEMA`` and ``messages``."""
        arrays = [
            pa.array(self.numbers[field.name], type=field.type)
            if field.name in self.numbers
            else self._taken(field.name)
            for field in (*SCHEMA, MESSAGES)
        ]
        return pa.Table.from_arrays(arrays, schema=SCHEMA.append(MESSAGES))

    def _taken(self, name: str) -> Any:
        own, other = (self.columns.column(one).chunks for one in (name, _SWAPPED.get(name, name)))
        both = pa.chunked_array([*own, *other], type=self.columns.column(name).type)
        return both.take(self.rows + len(self.columns) * self.swapped)

    def token_rows(self) -> list[tuple[NDArray[np.int32], NDArray[np.int32]]]:
        """Return (prompt, completion) of all chosen, then of all rejected sequences, uncopied."""
        prompts, ones, others = (
            [column[row].values.to_numpy() for row in self.rows.tolist()]
            for column in map(self.columns.column, ("prompt_ids", "chosen_ids", "rejected_ids"))
        )
        for at in np.flatnonzero(self.swapped):
            ones[at], others[at] = others[at], ones[at]
        return [*zip(prompts, ones, strict=True), *zip(prompts, others, strict=True)]

    def prompts(self) -> list[Prompt]:
        """Return the distinct prompts in the order of the pairs."""
        _, first = np.unique(self.column("prompt_id"), return_index=True)
        return [self._prompt(index) for index in np.sort(first).tolist()]

    def _prompt(self, index: int) -> Prompt:
        pair = self[index]
        messages = self.columns.column(MESSAGES.name)[int(self.rows[index])].as_py()
        turns = None if messages is None else tuple(json.loads(messages))
        return Prompt(pair.prompt_id, pair.prompt, pair.prompt_ids, turns)


def as_table(pairs: Sequence[Pair], turns: Mapping[str, str] | None = None) -> PairTable:
    """Return pairs as a table; a table as it is.

    Args:
        pairs: What the table is to hold.
        turns: The conversations behind prompts, as JSON by the prompt's text.
    """
    if isinstance(pairs, PairTable):
        return pairs
    messages = [(turns or {}).get(pair.prompt) for pair in pairs]
    return PairTable.of(arrow(pairs).append_column(MESSAGES, pa.array(messages, MESSAGES.type)))


def arrow(pairs: Sequence[Pair]) -> Any:
    """Return pairs as an Arrow table with the columns of ``SCHEMA``; every value bit for bit."""
    if isinstance(pairs, PairTable):
        return pairs.arrow().select(SCHEMA.names)
    known = list(pairs)
    arrays = [pa.array([getattr(pair, f.name) for pair in known], type=f.type) for f in SCHEMA]
    return pa.Table.from_arrays(arrays, schema=SCHEMA)


def join(*parts: Sequence[Pair]) -> PairTable:
    """Return the pairs of all parts, one after the other."""
    tables = [as_table(part) for part in parts] or [as_table([])]
    starts = np.cumsum([0, *(len(table.columns) for table in tables)])
    return PairTable(
        columns=pa.concat_tables([table.columns for table in tables]),
        rows=np.concatenate([t.rows + start for t, start in zip(tables, starts, strict=False)]),
        swapped=np.concatenate([table.swapped for table in tables]),
        numbers={n: np.concatenate([table.numbers[n] for table in tables]) for n in _NUMBERS},
    )


def with_reference(pairs: Sequence[Pair], logps: PairLogps) -> PairTable:
    """Return the pairs with log-probabilities under the reference.

    Args:
        pairs: ``B`` of them.
        logps: In nats, ``(B,)`` each.
    """
    table = as_table(pairs)
    found = {"ref_chosen_logps": logps.chosen, "ref_rejected_logps": logps.rejected}
    columns = {name: values.double().cpu().numpy() for name, values in found.items()}
    return replace(table, numbers={**table.numbers, **columns})
