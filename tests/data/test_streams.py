from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from typing import Any

import pytest

from tpmm_pl.data.parts import prompt_names
from tpmm_pl.data.streams import PairStream
from tpmm_pl.data.table import PairTable, as_table
from tpmm_pl.types import InputError, Pair


def table(*prompts: int) -> PairTable:
    return as_table([Pair(f"p{i}", f"prompt {i}", "", "", (i,), (7,), (8,)) for i in prompts])


class Source:
    """A stream of prompts 0.. in chunks of four; counts its chunks and passes."""

    def __init__(self, *prompts: int) -> None:
        self.prompts = prompts
        self.passes = 0
        self.chunks = 0

    def __call__(self) -> Iterator[PairTable]:
        self.passes += 1
        for start in range(0, len(self.prompts), 4):
            self.chunks += 1
            yield table(*self.prompts[start : start + 4])


def stream(source: Source, **changes: Any) -> PairStream:
    settings: dict[str, Any] = {
        "pairs_per_round": 6,
        "fuse": None,
        "evaluation": {},
        "fuse_fraction": 0.0,
        "eval_fraction": 0.0,
        "seed": 0,
        "label": "s",
    }
    return PairStream(source, **(settings | changes))


def named(part: PairTable) -> list[int]:
    return [int(name[1:]) for name in prompt_names(part)]


def test_every_round_takes_the_next_pairs_and_reads_no_further() -> None:
    source = Source(*range(100))
    pairs = stream(source)
    assert named(pairs.part(1)) == [0, 1, 2, 3, 4, 5]
    assert source.chunks == 2
    assert named(pairs.part(1)) == [0, 1, 2, 3, 4, 5], "asked for twice, read once"
    assert named(pairs.part(2)) == [6, 7, 8, 9, 10, 11]
    assert (source.chunks, source.passes) == (3, 1)


def test_a_resumed_run_skips_to_its_place() -> None:
    whole, resumed = stream(Source(*range(100))), stream(Source(*range(100)))
    parts = [named(whole.part(index)) for index in (1, 2, 3)]
    assert named(resumed.part(3)) == parts[2]
    assert named(whole.part(2)) == parts[1], "an earlier round is read again"


def test_a_stream_that_is_used_up_begins_again() -> None:
    source = Source(*range(10))
    pairs = stream(source)
    pairs.part(1)
    assert named(pairs.part(2)) == [6, 7, 8, 9, 0, 1]
    assert source.passes == 2


def test_a_stream_that_does_not_fill_a_round_is_refused() -> None:
    with pytest.raises(InputError, match=r"^s ends after 5 training pairs, fewer than .* 6; lower"):
        stream(Source(*range(5))).part(1)
    with pytest.raises(InputError, match="ends after 0 training pairs"):
        stream(Source()).part(1)


def test_a_prompt_is_on_one_side_wherever_it_occurs() -> None:
    prompts = [*range(200), *range(200)]
    settings = {"fuse_fraction": 0.2, "eval_fraction": 0.1, "pairs_per_round": 50}
    parts = stream(Source(*prompts), **settings).held_out(rounds=8, limit=1000)
    fuse, unseen = set(named(parts.fuse)), set(named(parts.evaluation["in_domain"]))
    training = stream(Source(*prompts), **settings)
    trained = set(chain(*(named(training.part(index)) for index in range(1, 9))))
    assert not trained & fuse
    assert not trained & unseen
    assert not fuse & unseen
    assert trained | fuse | unseen == set(range(200))
    # shares of 0.2 and 0.1 among 200: five standard deviations are 28 and 21
    assert len(fuse) == pytest.approx(40, abs=28)
    assert len(unseen) == pytest.approx(20, abs=21)


def test_held_out_pairs_come_from_the_beginning_up_to_a_limit() -> None:
    source = Source(*range(4000))
    settings = {"fuse_fraction": 0.2, "eval_fraction": 0.2}
    parts = stream(source, **settings).held_out(rounds=1000, limit=5)
    assert (len(parts.fuse), len(parts.evaluation["in_domain"])) == (5, 5)
    assert source.chunks < 50
    source = Source(*range(4000))
    stream(source, **settings).held_out(rounds=10, limit=1000)
    # 60 training pairs at 0.6 of a chunk of four
    assert source.chunks < 50


def test_a_part_without_a_pair_is_refused() -> None:
    with pytest.raises(InputError, match=r"^s: the pairs of 1 rounds hold none for fuse; raise"):
        stream(Source(*range(100)), fuse_fraction=1e-9).held_out(rounds=1, limit=5)
    with pytest.raises(InputError, match=r"fraction is 1\.2; give a number"):
        stream(Source(), fuse_fraction=0.6, eval_fraction=0.6)


def test_prompts_held_out_elsewhere_are_not_trained_on() -> None:
    settings = {"fuse": table(1, 50), "evaluation": {"far": table(4)}, "eval_fraction": 0.5}
    pairs = stream(Source(*range(12)), **settings)
    assert named(pairs.part(1)) == [0, 2, 3, 5, 6, 7]
    parts = stream(Source(*range(12)), **settings).held_out(rounds=1, limit=5)
    assert named(parts.fuse) == [1, 50]
    assert list(parts.evaluation) == ["far"]
    with pytest.raises(InputError, match="1 prompts are in the training data and in the held-out"):
        stream(Source(), fuse=table(1), evaluation={"far": table(1)})
