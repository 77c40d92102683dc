from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

import pytest

from tpmm_pl.data.rows.mixture import mixed
from tpmm_pl.types import InputError


def test_without_weights_streams_follow_one_another() -> None:
    assert list(mixed([iter("ab"), iter("cd")], [None, None], 0)) == list("abcd")
    assert list(mixed([], [], 0)) == []


@pytest.mark.parametrize("weights", [[1.0, 1.0, 1.0], [0.01, 5.0, 1e9]])
def test_no_row_is_lost_and_each_stream_keeps_its_order(weights: list[float]) -> None:
    streams = [[(k, i) for i in range(count)] for k, count in enumerate((40, 7, 0))]
    rows = list(mixed([iter(stream) for stream in streams], weights, 3))
    assert len(rows) == 47
    for k, stream in enumerate(streams):
        assert [row for row in rows if row[0] == k] == stream


def test_rows_come_in_proportion_to_the_weights() -> None:
    endless = [iter(lambda: "a", None), iter(lambda: "b", None)]
    drawn = list(islice(mixed(endless, [3.0, 1.0], 0), 10_000))
    # four standard deviations of 10,000 draws at 3/4
    assert abs(drawn.count("a") / 10_000 - 0.75) < 4 * (0.75 * 0.25 / 10_000) ** 0.5


def test_the_seed_alone_decides() -> None:
    def rows(seed: int) -> list[int]:
        return list(mixed([iter(range(50)), iter(range(50, 100))], [1.0, 2.0], seed))

    assert rows(1) == rows(1)
    assert rows(1) != rows(2)


def test_streams_are_read_as_rows_are_asked_for() -> None:
    taken = []

    def stream() -> Iterator[int]:
        for i in range(100):
            taken.append(i)
            yield i

    next(mixed([stream()], [1.0], 0))
    assert taken == [0]


@pytest.mark.parametrize(
    ("weights", "sentence"),
    [
        ([1.0, None], r"weights \[1\.0, None\]; give every source a weight, or none"),
        ([1.0, 0.0], r"a source has weight 0\.0; give a finite number above 0"),
        ([1.0, -1.0], r"a source has weight -1\.0"),
        ([1.0, float("nan")], r"a source has weight nan"),
        ([1.0, float("inf")], r"a source has weight inf"),
    ],
)
def test_weights_that_mean_nothing_are_refused(weights: list[float | None], sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        mixed([iter("a"), iter("b")], weights, 0)
