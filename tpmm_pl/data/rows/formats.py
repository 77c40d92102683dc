"""Rows in the shapes people keep them in become pairs and prompts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from math import nan
from typing import Any, TypeVar

from tpmm_pl.data.rows.columns import (
    Ids,
    Tools,
    margin,
    reference_logps,
    scores,
    token_ids,
    tools,
    weight,
)
from tpmm_pl.data.rows.messages import WAY_OUT, Content
from tpmm_pl.data.rows.rankings import pair_rows
from tpmm_pl.data.rows.report import DataReport
from tpmm_pl.data.rows.shapes import pair_contents, prompt_contents
from tpmm_pl.data.rows.sources import DataSource, located_rows
from tpmm_pl.types import InputError

T = TypeVar("T")

IDENTICAL = "chosen and rejected identical"


@dataclass(frozen=True)
class RawPrompt:
    """A prompt before template and tokenizer."""

    prompt: Content
    where: str = field(default="", compare=False)
    """File and line, for messages."""
    tools: Tools | None = field(default=None, kw_only=True)
    """JSON schemas for the chat template."""


@dataclass(frozen=True)
class RawPair(RawPrompt):
    """A preference before template and tokenizer; all three fields are of one kind."""

    chosen: Content = ""
    rejected: Content = ""
    score_chosen: float = nan
    score_rejected: float = nan
    margin: float = 0.0
    weight: float = 1.0
    ref_chosen_logps: float = nan
    """Nats, under a reference of the user's; NaN where the row does not tell."""
    ref_rejected_logps: float = nan
    ids: tuple[Ids, Ids, Ids] | None = None
    """Prompt, chosen and rejected of a pre-tokenised row, whose texts are empty here."""

    @property
    def is_identical(self) -> bool:
        """Whether nothing is preferred: both answers are the same."""
        if self.ids is not None:
            return self.ids[1] == self.ids[2]
        return self.chosen == self.rejected


def preferences(source: DataSource, report: DataReport) -> Iterator[RawPair]:
    """Read the pairs of a source lazily.

    Args:
        source: Rows of any shape :func:`to_preference` takes, or rankings.
        report: Counts the pairs read, and those dropped or bad.

    Yields:
        The pairs in the source's order.

    Raises:
        InputError: If the source cannot be read; if more rows are bad than the report allows; or
            if no pair is left.
    """
    label, kept = source.label, 0
    spread = partial(_pairs, pairing=source.pairing)
    for pairs, dropped in _converted(source, report, spread):
        dropped[IDENTICAL] = sum(pair.is_identical for pair in pairs)
        report.read(label, len(pairs) + dropped.total() - dropped[IDENTICAL])
        for reason, count in (+dropped).items():
            report.drop(label, reason, count)
        for pair in pairs:
            if not pair.is_identical:
                kept += 1
                yield pair
    if not kept:
        dropped = report.dropped(label)
        why = ", ".join(f"{count} {reason}" for reason, count in dropped.items()) or "none"
        raise InputError(f"{label} holds no usable pair (dropped: {why}); {WAY_OUT}")


def prompts(source: DataSource, report: DataReport) -> Iterator[RawPrompt]:
    """Read the prompts of a source lazily.

    Args:
        source: Rows of any shape :func:`to_prompt` takes.
        report: Counts the prompts read, and the bad rows.

    Yields:
        The prompts in the source's order.

    Raises:
        InputError: If the source cannot be read; if more rows are bad than the report allows; or
            if no prompt is left.
    """
    label, kept = source.label, 0
    for prompt in _converted(source, report, to_prompt):
        report.read(label)
        kept += 1
        yield prompt
    if not kept:
        raise InputError(f'{label} holds no prompt; a line is {{"prompt": "text or messages"}}')


def to_preference(row: Mapping[str, Any], where: str) -> RawPair:
    r"""Turn a row into a pair.

    Read are plain texts; lists of messages; lists of messages that begin with the same turns,
    which then are the prompt (a ``prompt`` text beside them only names it); texts without a
    prompt that begin with the same words, or with the same turns of the form
    ``"\n\nHuman: .. \n\nAssistant: .."``; and token ids.

    Beside them ``score_chosen`` and ``score_rejected`` are kept where they are numbers;
    ``margin``, ``weight``, ``ref_chosen_logps`` and ``ref_rejected_logps`` must be numbers where
    they are there; ``system`` is the first turn of a conversation and ``tools`` its functions.

    Args:
        row: The fields of one pair.
        where: File and line, for messages.

    Raises:
        InputError: If a field is missing, empty, or of another type than its neighbours.
    """
    ids = token_ids(row, where)
    prompt, chosen, rejected = ("", "", "") if ids else pair_contents(row, where)
    return RawPair(
        prompt,
        where,
        chosen,
        rejected,
        *scores(row),
        margin(row, where),
        weight(row, where),
        *reference_logps(row, where),
        ids,
        tools=tools(row, where),
    )


def to_prompt(row: Mapping[str, Any], where: str) -> RawPrompt:
    """Turn a row into a prompt.

    Read are ``prompt`` (text or messages); ``messages``, without the answers at their end; and the
    prompt of a pair that :func:`to_preference` takes.

    Args:
        row: The fields of one prompt.
        where: File and line, for messages.

    Raises:
        InputError: If there is no prompt, or it is answered already.
    """
    return RawPrompt(prompt_contents(row, where), where, tools=tools(row, where))


def _pairs(row: Mapping[str, Any], where: str, pairing: str) -> tuple[list[RawPair], Counter[str]]:
    rows, dropped = pair_rows(row, where, pairing)
    return [to_preference(pair, where) for pair in rows], dropped


def _converted(
    source: DataSource, report: DataReport, convert: Callable[[Mapping[str, Any], str], T]
) -> Iterator[T]:
    def refuse(error: InputError) -> None:
        report.read(source.label)
        report.bad(error, source.label)

    for where, row in located_rows(source, refuse):
        try:
            converted = convert(row, where)
        except InputError as error:
            refuse(error)
        except RecursionError:
            refuse(InputError(f"{where}: a field is nested too deeply; delete the row"))
        else:
            yield converted
