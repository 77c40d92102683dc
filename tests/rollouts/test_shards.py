from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pyarrow.parquet as pq
import pytest

from tests.rollouts.test_sampling import model, prompts, sample
from tpmm_pl.rollouts.shards import Shard, fingerprint, read_shards, write_shard
from tpmm_pl.types import InputError

FACTS: dict[str, str | int | float] = {"key": "0/1/pairs", "samples": 3, "temperature": 0.7}


def test_a_shard_is_named_as_it_is_asked_for(tmp_path: Path) -> None:
    shard = Shard.parse("2/8")
    assert shard == Shard(2, 8)
    assert str(shard) == "2/8"
    assert shard.path(tmp_path) == tmp_path / "shards" / "pairs_2_of_8.parquet"


@pytest.mark.parametrize("text", ["", "2", "0/8", "9/8", "2/8/1", "-1/2", "2 / 8", "../8"])
def test_what_names_no_shard_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="write the second of eight parts as 2/8"):
        Shard.parse(text)


def test_every_bit_survives_the_disk(tmp_path: Path) -> None:
    asked = prompts()
    made = sample(model(), asked)
    judged = [(one, 0.1 * number) for number, one in enumerate(made)]
    write_shard(Shard(1, 2).path(tmp_path), [4, 0], [*judged[12:], *judged[:3]], FACTS)
    write_shard(Shard(2, 2).path(tmp_path), [2], judged[6:9], FACTS)
    write_shard(Shard(3, 3).path(tmp_path), [], [], FACTS)
    found = read_shards(tmp_path, asked, 3, FACTS)
    assert found == {place: judged[3 * place : 3 * place + 3] for place in (4, 0, 2)}
    assert read_shards(tmp_path / "none", asked, 3, FACTS) == {}


@pytest.fixture
def written(tmp_path: Path) -> Path:
    path = Shard(1, 1).path(tmp_path)
    made = sample(model(), prompts())
    write_shard(path, range(5), [(one, 0.0) for one in made], FACTS)
    return path


@pytest.mark.parametrize("harm", ["cut", "flipped", "empty", "other"])
def test_a_harmed_shard_is_refused_in_one_sentence(harm: str, written: Path) -> None:
    content = written.read_bytes()
    if harm == "other":
        pq.write_table(pq.read_table(written).select(["place"]), written)
    else:
        middle = len(content) // 2
        harmed = {
            "cut": content[:middle],
            "flipped": content[:300] + bytes([content[300] ^ 1]) + content[301:],
            "empty": b"",
        }
        written.write_bytes(harmed[harm])
    with pytest.raises(InputError, match=r"pairs_1_of_1.parquet cannot be read \(.*delete it") as e:
        read_shards(written.parent.parent, prompts(), 3, FACTS)
    assert "\n" not in str(e.value)


def test_a_shard_of_something_else_is_refused_and_says_what(written: Path) -> None:
    with pytest.raises(InputError, match=r"was made with temperature 0\.7, and this run has 1\.0;"):
        read_shards(written.parent.parent, prompts(), 3, {**FACTS, "temperature": 1.0})


def test_completions_that_are_not_whole_are_refused(written: Path) -> None:
    table = pq.read_table(written)
    pq.write_table(table.slice(0, len(table) - 1), written)
    with pytest.raises(InputError, match="are not whole; delete the folder"):
        read_shards(written.parent.parent, prompts(), 3, FACTS)


def test_a_fingerprint_is_of_what_is_asked_not_of_where_it_runs() -> None:
    judge = SimpleNamespace(bias=0.1, device="cpu", members=[SimpleNamespace(name="a")])
    same = SimpleNamespace(bias=0.1, device="cuda", members=[SimpleNamespace(name="a")])
    assert fingerprint(judge) == fingerprint(same)
    other: list[dict[str, object]] = [
        {"bias": 0.2}, {"members": [SimpleNamespace(name="b")]}, {"members": []}
    ]  # fmt: skip
    for change in other:
        assert fingerprint(judge) != fingerprint(SimpleNamespace(**{**vars(judge), **change}))
    assert fingerprint([("p0", (1, 2))]) != fingerprint([("p0", (1, 3))])
